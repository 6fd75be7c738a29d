"""Decoding one token: products of one row with weights out of memory, then whole decoder layers.

    python benchmarks/decode.py [--parts gemv block] [--rounds 30] [--out FILE]

Everything is cold: contestants take turns call by call, and what the others read between two turns
is several times the last-level cache. One thread. `gemv` is a chain of linear layers 4096x4096,
each with its own weights; times are of one layer. `block` is a chain of TinyLlama-shaped decoder
layers, one token, 255 positions of keys and values as inputs. Peers get their best settings:
OpenVINO's compressed weights (NNCF, groups of 64) with dynamic quantization of activations in
groups of 32, which was faster than 0, 64 and 128. Error is the relative L2 distance to torch
float32 behind the whole chain. The memory bandwidth is measured in the same turns, by a kernel that
only reads. Peers that are not installed are left out.
"""

import argparse
import json
import logging
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from linear_kernels import cpu, versions
from numpy.typing import NDArray

from t3c import targets
from t3c.api import elasticize
from t3c.codegen.build import build, tvm_target
from t3c.codegen.families import families_of
from t3c.codegen.kernels.emit import Emitter, buffer, lanes
from t3c.codegen.kernels.family import AbstractGroupedKernels, Kernel, Packed
from t3c.codegen.script import read_function
from t3c.codegen.tvm_api import tvm
from t3c.core.codes import GROUP, RATIO, Nested, quantize_groups, quantize_weight
from t3c.core.formats import Dense, Format
from t3c.core.manifest import TensorSpec
from t3c.passes.pipeline import lowering_graph
from t3c.runtime import tvm_vm
from t3c.runtime.entry import NativeEntry, Scratch
from t3c.runtime.weights import aligned_copy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.decode import Shape, tinyllama_step

Call = Callable[[], Any]
WIDTH = 4096
LAYERS = 2
RANK = 1024
STREAM_BYTES = 1 << 26
SETTINGS = {
    "INFERENCE_NUM_THREADS": 1,
    "NUM_STREAMS": 1,
    "INFERENCE_PRECISION_HINT": "f32",
    "PERFORMANCE_HINT": "LATENCY",
}
COMPRESSED = {**SETTINGS, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}


def compiled(kernels: Sequence[Kernel]) -> Any:
    """A library of kernels for this machine."""
    module = tvm.IRModule({k.name: read_function(k.source) for k in kernels})
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        return tvm.compile(module, target=tvm_target(targets.detect_host()))


def tensors(arrays: Sequence[NDArray[np.generic]]) -> list[Any]:
    """TVM's tensors with these values."""
    return [tvm.runtime.tensor(array) for array in arrays]


def outputs(kernel: Kernel) -> list[Any]:
    """Room for a kernel's outputs."""
    return tensors([np.zeros(shape, dtype) for shape, dtype in kernel.outs])


def reader(streams: int) -> Call:
    """Read `STREAM_BYTES` in so many streams, and nothing else."""
    lines = STREAM_BYTES // 64 // streams
    e = Emitter()
    total = e.alloc("total", (16 * streams,), "int32")
    for s in range(streams):
        e(f"{total}[{lanes(16 * s)}] = T.broadcast(T.int32(0), 16)")
    with e.loop("line", lines) as line:
        for s in range(streams):
            at = f"{total}[{lanes(16 * s)}]"
            e(f"{at} = {at} + x[{s}, {line}, {lanes(0)}]")
    for s in range(streams):
        e(f"y[{s}, {lanes(0)}] = {total}[{lanes(16 * s)}]")
    name = f"read_{streams}"
    shapes = ((streams, lines, 16), (streams, 16))
    params = [buffer(n, shape, "int32") for n, shape in zip("xy", shapes, strict=True)]
    function = compiled([Kernel(name, e.function(name, params), ())])[name]
    x, y = tensors([np.ones(shape, np.int32) for shape in shapes])
    return lambda: function(x, y)


def chain(weights: Sequence[NDArray[np.float32]], x: NDArray[np.float32]) -> dict[str, Call]:
    """Our kernels, one after another through every layer."""
    family = families_of(targets.detect_host()).linear
    four = family.grouped
    if four is None:
        raise SystemExit(f"{family.name} has no 4-bit kernels")
    n = WIDTH
    quantize = family.quantize(1, n)
    kernels = {
        "t3c int8": family.dense(1, n, n),
        "t3c int4": four.dense(1, n, n),
        "t3c int8 nested in int4": four.nested(1, n, n),
        f"t3c int8 rank {RANK}": family.low_rank(1, n, n, RANK, RANK),
        f"t3c int4 rank {RANK}": four.low_rank(1, n, n, RANK, RANK),
    }
    library = compiled([quantize, *kernels.values()])
    bias = np.zeros(n, np.float32)
    packed: dict[str, list[list[Any]]] = {name: [] for name in kernels}
    for w in weights:
        # speed alone: the cut factors of a random matrix say nothing about networks
        low, high = w[:RANK], np.ascontiguousarray(w[:, :RANK]) * np.float32(2)
        names = iter(kernels)
        for arrays in (
            family.pack_dense(quantize_weight(w), bias),
            four.pack_dense(quantize_groups(w), bias),
            planes(four, nest(w), bias),
            family.pack_low_rank(quantize_weight(low), quantize_weight(high), bias),
            four.pack_low_rank(quantize_groups(low), quantize_groups(high), bias),
        ):
            packed[next(names)].append(tensors(list(arrays.values())))

    def run(name: str) -> Call:
        product, quantizer = library[kernels[name].name], library[quantize.name]
        codes, values = outputs(quantize), [*tensors([x]), *outputs(kernels[name])]

        def call() -> NDArray[np.float32]:
            at = values[0]
            for layer in packed[name]:
                quantizer(at, *codes)
                product(*codes, *layer, values[1])
                at = values[1]
            result: NDArray[np.float32] = at.numpy()
            return result

        return call

    return {name: run(name) for name in kernels}


def nest(w: NDArray[np.float32]) -> Nested:
    """4-bit codes, and what is left of the weights in fine ones."""
    coarse = quantize_groups(w)
    step = np.repeat(coarse.scale / RATIO, GROUP, axis=1)
    fine = np.clip(np.rint(w / step) - RATIO * coarse.q, -8, 7)
    return Nested(coarse, fine.astype(np.int8))


def planes(four: AbstractGroupedKernels, w: Nested, bias: NDArray[np.float32]) -> Packed:
    """Both planes, as `nested` takes them."""
    return four.pack_dense(w.coarse, bias) | {"fine": four.pack_fine(w)["weight"]}


def profiles(model: torch.nn.Module, inputs: tuple[Any, ...]) -> dict[str, Call]:
    """The whole network lowered with one format everywhere."""
    elastic = elasticize(model, inputs)
    formats: dict[str, Format] = {"t3c int8": Dense(8), "t3c int4": Dense(4)}
    codes = {site: elastic.codes(site, formats.values()) for site in elastic.sites}
    built = build(
        torch.export.export(lowering_graph(elastic.graph), elastic.example_inputs, strict=False),
        elastic.sites,
        codes,
        {
            name.replace(" ", "_"): dict.fromkeys(elastic.sites, fmt)
            for name, fmt in formats.items()
        },
        targets.detect_host(),
    )
    with tempfile.TemporaryDirectory() as folder:
        built.save(Path(folder) / "model.so")
        library = tvm_vm.Library(Path(folder) / "model.so", "llvm")
    given = [tvm_vm.share(aligned_copy(x.numpy())) for x in elastic.example_inputs]
    with torch.inference_mode():
        results = elastic.graph(*elastic.example_inputs)
    outs = [TensorSpec(f"y{i}", tuple(y.shape), "float32") for i, y in enumerate(results)]

    def run(name: str) -> Call:
        made = built.profiles[name.replace(" ", "_")]
        weights = [tvm_vm.share(aligned_copy(built.tensors[t])) for t in made.weights]
        function = library.native(made.function)
        call = NativeEntry(function, weights, made.arena_bytes or 0, outs, Scratch())
        return lambda: call(given, as_torch=False)[0]

    return {name: run(name) for name in formats}


def torch_calls(model: torch.nn.Module, inputs: tuple[Any, ...]) -> dict[str, Call]:
    """Float32 and dynamic int8 with the fast engine."""
    torch.backends.quantized.engine = "onednn"
    int8 = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    def call(net: torch.nn.Module) -> Call:
        def run() -> Any:
            with torch.inference_mode():
                result = net(*inputs)
                return (result[0] if isinstance(result, tuple) else result).numpy()

        return run

    return {"torch float32": call(model), "torch int8": call(int8)}


class Flat(torch.nn.Module):
    """Tensors in, the first output out."""

    def __init__(self, model: torch.nn.Module, structure: tuple[Any, ...]) -> None:
        """Remember which inputs are lists."""
        super().__init__()
        self.model = model
        self.counts = [len(x) if isinstance(x, list) else 0 for x in structure]

    def forward(self, *flat: torch.Tensor) -> Any:
        """Call the model."""
        left = list(flat)
        args = [[left.pop(0) for _ in range(n)] if n else left.pop(0) for n in self.counts]
        result = self.model(*args)
        return result[0] if isinstance(result, tuple) else result


def onnx_model(
    model: torch.nn.Module, inputs: tuple[Any, ...], folder: Path
) -> tuple[Path, dict[str, Any]]:
    """The model as ONNX, and its inputs by name."""
    flat = [t for x in inputs for t in (x if isinstance(x, list) else [x])]
    names = [f"input{i}" for i in range(len(flat))]
    path = folder / "model.onnx"
    torch.onnx.export(
        Flat(model, inputs).eval(),
        tuple(flat),
        str(path),
        input_names=names,
        opset_version=17,
        dynamo=False,
    )
    return path, {name: x.numpy() for name, x in zip(names, flat, strict=True)}


def four_bits(path: Path, out: Path) -> None:
    """Products with constants become MatMulNBits: our codes, int8 activations inside."""
    import onnx

    model = onnx.load(str(path))
    constants = {c.name: c for c in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in constants:
            continue
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        w = onnx.numpy_helper.to_array(constants[node.input[1]])
        codes = quantize_groups(w if turned else np.ascontiguousarray(w.T))
        n, k = codes.q.shape
        pairs = (codes.q.astype(np.uint8) + np.uint8(8)).reshape(n, k // 64, 32, 2)
        names = f"{node.output[0]}_codes", f"{node.output[0]}_scales"
        arrays = pairs[..., 0] | (pairs[..., 1] << 4), codes.scale.reshape(-1)
        for name, array in zip(names, arrays, strict=True):
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        sizes = {"K": k, "N": n, "bits": 4, "block_size": 64, "accuracy_level": 4}
        made = onnx.helper.make_node(
            "MatMulNBits", [node.input[0], *names], node.output, domain="com.microsoft", **sizes
        )
        model.graph.initializer.remove(constants.pop(node.input[1]))
        node.CopyFrom(made)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(out))


def onnxruntime_calls(path: Path, given: Mapping[str, Any]) -> dict[str, Call]:
    """Dynamic int8, and int4 in blocks of 64 with int8 activations."""
    import onnxruntime
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    int8, int4 = path.with_name("int8.onnx"), path.with_name("int4.onnx")
    quantize(path, int8, weight_type=QuantType.QInt8, per_channel=True)
    four_bits(path, int4)

    def call(file: Path) -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, dict(given))[0]

    return {"ORT int8": call(int8), "ORT int4": call(int4)}


def openvino_calls(path: Path, given: Mapping[str, Any]) -> dict[str, Call]:
    """Compressed weights of 4 and 8 bits, and int8 throughout."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    core = openvino.Core()
    mode = nncf.CompressWeightsMode
    four: dict[str, Any] = {"group_size": 64, "ratio": 1.0, "all_layers": True}
    data = nncf.Dataset([dict(given)] * 2)
    models = {
        "OpenVINO int4": (
            nncf.compress_weights(core.read_model(path), mode=mode.INT4_SYM, **four),
            COMPRESSED,
        ),
        "OpenVINO int8 weights": (
            nncf.compress_weights(core.read_model(path), mode=mode.INT8_SYM),
            COMPRESSED,
        ),
        "OpenVINO int8": (nncf.quantize(core.read_model(path), data, subset_size=2), SETTINGS),
    }

    def call(model: Any, settings: Mapping[str, Any]) -> Call:
        request = core.compile_model(model, "CPU", dict(settings)).create_infer_request()
        for name, value in given.items():
            request.set_tensor(name, openvino.Tensor(value))

        def run() -> Any:
            request.infer()
            return request.get_output_tensor(0).data

        return run

    return {name: call(*pair) for name, pair in models.items()}


def peers(model: torch.nn.Module, inputs: tuple[Any, ...]) -> dict[str, Call]:
    """Everybody else who is installed."""
    calls = torch_calls(model, inputs)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, given = onnx_model(model, inputs, Path(folder))
        if find_spec("onnxruntime"):
            calls |= onnxruntime_calls(path, given)
        if find_spec("openvino") and find_spec("nncf"):
            calls |= openvino_calls(path, given)
    return calls


def race(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns; the first two turns do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-2, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def contest(
    calls: dict[str, Call], layers: int, weights: Mapping[str, int], rounds: int
) -> list[dict[str, Any]]:
    """Rows of one part; `weights` are the bytes that one layer reads, where they are known."""
    results = {name: np.array(call(), np.float64) for name, call in calls.items()}
    reads = {f"read {s} streams": reader(s) for s in (1, 4, 8)}
    seconds = race(calls | reads, rounds)
    marks = {name: np.percentile(s, (50, 10)) for name, s in seconds.items()}
    bandwidth = STREAM_BYTES / np.min([marks[name] for name in reads], axis=0)
    want = results["torch float32"]
    rows: list[dict[str, Any]] = []
    for name in calls:
        middle, quiet = (round(float(t) / layers * 1e6, 1) for t in marks[name])
        row: dict[str, Any] = {"name": name, "p50_us": middle, "p10_us": quiet}
        if "rank" not in name:
            error = np.linalg.norm(results[name] - want) / np.linalg.norm(want)
            row["error"] = float(f"{error:.3g}")
        if name in weights:
            shares = weights[name] * layers / marks[name] / bandwidth
            row["bandwidth_share_p50"], row["bandwidth_share_p10"] = (
                round(float(share), 3) for share in shares
            )
        rows.append(row)
    middle, quiet = (round(float(b) / 1e9, 2) for b in bandwidth)
    rows.append({"name": "memory read", "p50_gb_s": middle, "p10_gb_s": quiet})
    return rows


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Ours to the best peer of as many bits, by medians and by quiet tenths."""
    found: dict[str, list[float]] = {}
    for mark in ("p50_us", "p10_us"):
        times = {row["name"]: row[mark] for row in rows if mark in row}
        for bits in (4, 8):
            others = [t for n, t in times.items() if f"int{bits}" in n and not n.startswith("t3c")]
            for name, t in times.items():
                if others and name.startswith(f"t3c int{bits}"):
                    ratio = round(t / min(others), 3)
                    found.setdefault(f"{name} / best int{bits} peer", []).append(ratio)
    return found


def gemv(rounds: int) -> list[dict[str, Any]]:
    """The chain of square layers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    model.eval().requires_grad_(False)
    x = torch.randn(1, WIDTH)
    ours = chain([p.numpy() for p in model.parameters()], x.numpy())
    four = 0.5 + 2 / 64  # a byte for two codes, two bytes for 64 scales
    factors = 2 * RANK * WIDTH
    read = {
        "t3c int8": WIDTH**2,
        "t3c int4": int(WIDTH**2 * four),
        f"t3c int8 rank {RANK}": factors,
        f"t3c int4 rank {RANK}": int(factors * four),
    }
    return contest(ours | peers(model, (x,)), LAYERS, read, rounds)


def block(rounds: int) -> list[dict[str, Any]]:
    """The chain of decoder layers."""
    shape = Shape(layers=1)
    model, inputs = tinyllama_step(shape)
    count = sum(p.numel() for p in model.parameters() if p.dim() == 2) // shape.layers
    cache = 8 * shape.past * shape.kv_heads * shape.head_dim
    read = {"t3c int8": count + cache, "t3c int4": int(count * (0.5 + 2 / 64)) + cache}
    ours = profiles(model, inputs)
    return contest(ours | peers(model, inputs), shape.layers, read, rounds)


PARTS = {"gemv": gemv, "block": block}


def main() -> None:
    """Run, print, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TVM_NUM_THREADS"] = "1"  # read when the first parallel loop runs
    model, flags = cpu()
    record: dict[str, Any] = {
        "schema": 1,
        "what": "one token, one thread, cold weights; microseconds of one layer: p50 and p10",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
        "machine": {
            "cpu": model,
            "cores": os.cpu_count(),
            "features": [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if f in flags],
            "load": os.getloadavg()[0],
        },
        "rounds": options.rounds,
        "versions": versions(),
    }
    for part in options.parts:
        rows = PARTS[part](options.rounds)
        record[part] = {"rows": rows, "ratios": ratios(rows)}
        for row in rows:
            print(part, *(f"{key} {value}" for key, value in row.items()), flush=True)
        for name, value in ratios(rows).items():
            print(part, name, value, flush=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
