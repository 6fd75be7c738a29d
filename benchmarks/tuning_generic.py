"""TVM's generic search (MetaSchedule) against our kernels and rules, on this machine, one thread.

    python benchmarks/tuning_generic.py [--target x86-vnni] [--trials 64]

Each naive loop nest is tuned with --trials trials through our builder and runner; its best result
then takes turns with ours for the same computation. The int8 product gets the processor's
instruction as a tensor intrinsic and weights already packed, which favours the search; ours follows
the family's rule, without any search. Written into tuning.json beside the other results.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tuning import store, stored

from t3c import targets
from t3c.codegen.families import families_of
from t3c.codegen.rules import schedule as by_rules
from t3c.codegen.script import read_function
from t3c.codegen.tune.inproc import Builder, Runner, Shop, contestant
from t3c.codegen.tune.measure import Arguments, Contestant, contest, ratio
from t3c.codegen.tvm_api import make_target, meta_schedule, relax, tvm
from t3c.targets.base import TargetSpec

INTRINSIC = "t3c_vpdpbusd"
te: Any = tvm.te


def int8_product(m: int, n: int, k: int) -> Any:
    """C[m, n] = A[m, k] u8 x B[n/16, k/4, 16, 4] i8."""
    a = te.placeholder((m, k), "uint8", "A")
    b = te.placeholder((n // 16, k // 4, 16, 4), "int8", "B")
    d = te.reduce_axis((0, k), "k")

    def product(i: Any, j: Any) -> Any:
        weight = b[j // 16, d // 4, j % 16, d % 4].astype("int32")
        return te.sum(a[i, d].astype("int32") * weight, axis=d)

    return te.create_prim_func([a, b, te.compute((m, n), product, "C")])


def float_function(
    shapes: list[tuple[int, ...]], make: Callable[..., Any], *, name: str = "main"
) -> Any:
    """The one fused function that Relax makes of an expression."""
    inputs = [relax.Var(f"x{i}", relax.TensorType(s, "float32")) for i, s in enumerate(shapes)]
    builder = relax.BlockBuilder()
    with builder.function(name, inputs):
        with builder.dataflow():
            out = builder.emit_output(make(builder, *inputs))
        builder.emit_func_output(out)
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    module = tvm.transform.Sequential(passes)(builder.finalize())
    functions = [f for _, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    (function,) = functions
    return function


def float_cases() -> dict[str, Any]:
    """What a transformer has beside products: an element-wise chain, a softmax, a reduction."""
    op = relax.op

    def chain(b: Any, x: Any, y: Any) -> Any:
        return b.emit(op.add(b.emit(op.multiply(x, b.emit(op.sigmoid(x)))), y))

    return {
        "x * sigmoid(x) + y, 197x3072": float_function([(197, 3072), (197, 3072)], chain),
        "softmax 2364x197": float_function([(2364, 197)], lambda b, x: b.emit(op.nn.softmax(x))),
        "mean of 64x3136": float_function([(64, 3136)], lambda b, x: b.emit(op.mean(x, 1))),
    }


def space() -> Any:
    """The default rules with the dot product of VNNI tensorized."""
    rules, post = meta_schedule.schedule_rule, meta_schedule.postproc
    tiles: dict[str, Any] = {
        "structure": "SSRSRS",
        "tile_binds": None,
        "max_innermost_factor": 64,
        "vector_load_lens": None,
        "reuse_read": None,
        "reuse_write": rules.ReuseType(req="may", levels=[1, 2], scope="global"),
    }
    return meta_schedule.space_generator.PostOrderApply(
        sch_rules=[
            rules.MultiLevelTilingWithIntrin(INTRINSIC, **tiles),
            rules.MultiLevelTiling(**tiles),
            rules.ParallelizeVectorizeUnroll(
                max_jobs_per_core=16,
                max_vectorize_extent=64,
                unroll_max_steps=[0, 16, 64, 512],
                unroll_explicit=True,
            ),
            rules.RandomComputeLocation(),
        ],
        postprocs=[
            post.DisallowDynamicLoop(),
            post.RewriteParallelVectorizeUnroll(),
            post.RewriteReductionBlock(),
            post.RewriteTensorize(vectorize_init_loop=True),
        ],
        mutator_probs={
            meta_schedule.mutator.MutateTileSize(): 0.9,
            meta_schedule.mutator.MutateComputeLocation(): 0.05,
            meta_schedule.mutator.MutateUnroll(): 0.03,
        },
    )


def register_intrinsic() -> None:
    """VPDPBUSD: TVM's own spelling fails LLVM's verification."""
    head = (
        "@T.prim_func(s_tir=True)\ndef f(\n"
        '    A: T.Buffer((4,), "uint8", offset_factor=1),\n'
        '    B: T.Buffer((16, 4), "int8", offset_factor=1),\n'
        '    C: T.Buffer((16,), "int32", offset_factor=1),\n):\n    with T.sblock("root"):\n'
        "        T.reads(C[0:16], A[0:4], B[0:16, 0:4])\n        T.writes(C[0:16])\n"
    )
    loops = (
        "        for i in T.serial(0, 16):\n            for k in T.serial(0, 4):\n"
        '                with T.sblock("update"):\n'
        '                    vi, vk = T.axis.remap("SR", [i, k])\n'
        '                    C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")\n'
    )
    call = (
        '        a = T.reinterpret(A.vload([0], "uint8x4"), dtype="int32")\n'
        "        C[T.ramp(T.int32(0), 1, 16)] = T.call_llvm_pure_intrin(\n"
        '            "int32x16", "llvm.x86.avx512.vpdpbusd.512", C.vload([0], dtype="int32x16"),\n'
        '            T.reinterpret(T.broadcast(a, 16), dtype="int8x64"),\n'
        '            B.vload([0, 0], dtype="int8x64"))\n'
    )
    parse = tvm.script.from_source
    tvm.s_tir.TensorIntrin.register(INTRINSIC, parse(head + loops), parse(head + call))


def tuned(function: Any, target: Any, trials: int, rules: Any) -> tuple[Contestant, float, int]:
    """(the best of a search, seconds it took, trials that ran)."""
    shop = Shop()
    hot = Arguments(cold_bytes=0)
    callbacks = meta_schedule.measure_callback  # the stock ones delete the folder of an artifact
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        database = meta_schedule.tune_tir(
            function.with_attr("global_symbol", "main"),
            target,
            folder,
            trials,
            num_trials_per_iter=16,
            builder=Builder(shop),
            runner=Runner(shop, 1.0, (3, 8), hot),
            cost_model="xgb",
            num_tuning_cores=1,
            measure_callbacks=[callbacks.AddToDatabase(), callbacks.UpdateCostModel()],
            space=rules,
            seed=0,
        )
        seconds = time.perf_counter() - start
        best = meta_schedule.tir_integration.compile_tir(
            database, function.with_attr("global_symbol", "main"), target
        )
        return contestant(best.mod, target), seconds, len(database)


def main() -> None:
    """Search, contest, JSON."""
    parser = argparse.ArgumentParser(description="MetaSchedule against our kernels and rules.")
    parser.add_argument("--target", default="x86-vnni")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--only", default="", help="cases whose name has this text")
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = "1"
    spec = targets.get(options.target)
    target = make_target({"kind": "llvm", "mcpu": spec.mcpu, "num-cores": 1})
    rows = {row["what"]: row for row in stored(options.target, "generic_search")}
    for label, ours, naive, rules in cases(spec, target):
        if options.only in label:
            row = compare(label, ours, naive, target, options.trials, rules)
            rows[label] = row
            store(options.target, {"generic_search": {"rows": list(rows.values())}})


def cases(spec: TargetSpec, target: Any) -> Iterator[tuple[str, Contestant, Any, Any]]:
    """(name, ours, naive loops, space of the search)."""
    if spec.linear == "x86-vnni":
        register_intrinsic()
        for m, n, k in ((197, 768, 768), (128, 3072, 768)):
            ours = product_of_ours(spec, target, m, n, k)
            yield f"int8 product {m}x{n}x{k}", ours, int8_product(m, n, k), space()
    for label, function in float_cases().items():
        mine = by_rules(function, spec).with_attr("global_symbol", "main")
        ours = contestant(tvm.IRModule({"main": mine}), target)
        yield label, ours, function, "post-order-apply"


def product_of_ours(spec: TargetSpec, target: Any, m: int, n: int, k: int) -> Contestant:
    """The family's kernel that stores accumulators, by its rule."""
    kernel = families_of(spec).linear.dense(m, n, k, raw=True)
    return contestant(tvm.IRModule({kernel.name: read_function(kernel.source)}), target)


def compare(
    label: str, ours: Contestant, function: Any, target: Any, trials: int, rules: Any
) -> dict[str, Any]:
    """One row: a search, then both take turns on the same kind of data, in cache."""
    found, seconds, measured = tuned(function, target, trials, rules)
    hot = Arguments(cold_bytes=0)
    mine, theirs = contest([ours, found], hot, np.random.default_rng(0), 2.0, (20, 100))
    r = ratio(theirs, mine)
    row = {
        "what": label,
        "ours_us": round(float(np.median(mine)) * 1e6, 1),
        "generic_us": round(float(np.median(theirs)) * 1e6, 1),
        "ratio": round(r.median, 2),
        "interval": [round(r.low, 2), round(r.high, 2)],
        "search_s": round(seconds, 1),
        "trials": measured,
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
