"""Times the int8 linear kernels against other runtimes on this machine, one thread.

    python benchmarks/linear_kernels.py [--rounds 20] [--families x86-vnni] [--ranks 64]

Every contender does a whole linear layer, float32 in and out, with its own weights: ours is the
quantization pass and the product, each timed and added. Peers: torch float32, torch dynamic int8
(engine onednn), ONNX Runtime dynamic int8, OpenVINO int8 (static, NNCF). Low rank: two thin layers
for everyone. Contenders take turns call by call; printed are medians and quiet tenths in
microseconds of processor time, which is the time of a call on a quiet machine. Peers that are not
installed are left out. Accuracy is not matched.

Share is a product's multiply-adds over the peak that was measured first: the family's own
register block with operands at hand. ONEDNN_MAX_CPU_ISA and DNNL_MAX_CPU_ISA restrict torch and
OpenVINO to older instructions; ONNX Runtime knows no such setting and is then left out.
"""

import argparse
import json
import logging
import os
import platform
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t3c.codegen.kernels.emit import Emitter, buffer, lanes
from t3c.codegen.kernels.family import AbstractLinearKernels, Kernel
from t3c.codegen.kernels.linear_amx import AmxLinear
from t3c.codegen.kernels.linear_avx2 import Avx2Linear
from t3c.codegen.kernels.linear_portable import PortableLinear
from t3c.codegen.kernels.linear_row_family import AbstractRowFamily
from t3c.codegen.kernels.linear_rows import Dot
from t3c.codegen.kernels.linear_vnni import VnniLinear
from t3c.codegen.tvm_api import compile_source, make_target, tvm
from t3c.core.codes import quantize_weight

SIZES = (
    (197, 3072, 768),
    (197, 768, 768),
    (197, 768, 3072),
    (128, 3072, 768),
    (128, 768, 768),
    (128, 768, 3072),
    (128, 384, 384),
    (128, 1536, 384),
    (128, 384, 1536),
)
RANKS = (64, 128, 256)
RESTRICTED = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
FAMILIES: dict[str, tuple[AbstractLinearKernels, str, frozenset[str]]] = {
    "x86-amx": (AmxLinear(), "sapphirerapids", frozenset({"amx_int8", "avx512_vnni"})),
    "x86-vnni": (VnniLinear(), "icelake-server", frozenset({"avx512_vnni"})),
    "x86-avx2": (Avx2Linear(), "x86-64-v3", frozenset({"avx2", "fma"})),
    "portable": (PortableLinear(), "x86-64-v3", frozenset({"avx2", "fma"})),
}
Call = Callable[[], object]


def cpu() -> tuple[str, frozenset[str]]:
    """Model name and flags of /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    first = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    return first.get("model name", platform.processor()), frozenset(first.get("flags", "").split())


def peak(dot: Dot, mcpu: str) -> float:
    """Multiply-adds in a second of a family's register block whose operands are always near."""
    rounds, rows, parts = 1 << 18, dot.height, dot.wide * 16 // dot.part
    size, e = dot.part * dot.depth, Emitter()
    at = lanes(0, dot.part)
    weights = [e.let("w", dot.weight(f"line[{j}, {lanes(0, size)}]")) for j in range(parts)]
    block = [
        [f"{e.alloc('acc', (dot.part,), 'int32')}[{at}]" for _ in weights] for _ in range(rows)
    ]
    for i, accs in enumerate(block):
        for j, acc in enumerate(accs):
            e(f"{acc} = y[{i}, {j}, {at}]")
    with e.loop("i", rounds) as loop:
        for i, accs in enumerate(block):
            codes = lanes(f"{loop} % 64 * {dot.depth}", dot.depth)
            x = e.let("x", dot.inputs(f"codes[{i}, {codes}]"))
            for acc, weight in zip(accs, weights, strict=True):
                e(f"{acc} = {dot.add(acc, weight, x)}")
    for i, accs in enumerate(block):
        for j, acc in enumerate(accs):
            e(f"y[{i}, {j}, {at}] = {acc}")
    shapes = ((parts, size), (rows, 64 * dot.depth), (rows, parts, dot.part))
    dtypes = ("int8", dot.layout.dtype, "int32")
    named = zip(("line", "codes", "y"), shapes, dtypes, strict=True)
    source = e.function("peak", [buffer(*one) for one in named])
    run = compile_source("peak", source, make_target({"kind": "llvm", "mcpu": mcpu}))["peak"]
    given = [tvm.runtime.tensor(np.ones(x, d)) for x, d in zip(shapes, dtypes, strict=True)]
    best = min(measure({"peak": lambda: run(*given)}, 15)["peak"])
    return rounds * rows * parts * size / best * 1e6


def ours(
    family: AbstractLinearKernels, mcpu: str, x: np.ndarray[Any, Any], n: int, rank: int | None
) -> dict[str, Call]:
    """Our two kernels; weights are random codes."""
    m, k = x.shape
    target = make_target({"kind": "llvm", "mcpu": mcpu})
    rng = np.random.default_rng(n)

    def matrix(rows: int, cols: int) -> Any:
        return quantize_weight(rng.standard_normal((rows, cols)).astype(np.float32))

    def build(kernel: Kernel) -> tuple[Any, list[Any]]:
        outs = [tvm.runtime.tensor(np.zeros(shape, dtype)) for shape, dtype in kernel.outs]
        return compile_source(kernel.name, kernel.source, target)[kernel.name], outs

    bias = rng.standard_normal(n).astype(np.float32)
    if rank is None:
        kernel = family.dense(m, n, k)
        packed = family.pack_dense(matrix(n, k), bias)
    else:
        kernel = family.low_rank(m, n, k, rank, max(RANKS))
        packed = family.pack_low_rank(matrix(max(RANKS), k), matrix(n, max(RANKS)), bias)
    quantize, codes = build(family.quantize(m, k))
    product, y = build(kernel)
    weights = [tvm.runtime.tensor(array) for array in packed.values()]
    source = tvm.runtime.tensor(x)
    return {
        "quantize": lambda: quantize(source, *codes),
        "product": lambda: product(*codes, *weights, *y),
    }


def module(n: int, k: int, rank: int | None) -> torch.nn.Module:
    """The peers' model."""
    if rank is None:
        return torch.nn.Sequential(torch.nn.Linear(k, n)).eval()
    thin = torch.nn.Linear(k, rank, bias=False)
    return torch.nn.Sequential(thin, torch.nn.Linear(rank, n)).eval()


def torch_calls(model: torch.nn.Module, x: torch.Tensor) -> dict[str, Call]:
    """Float32 and dynamic int8."""
    torch.backends.quantized.engine = "onednn"
    int8 = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    def call(net: torch.nn.Module) -> Call:
        def run() -> object:
            with torch.inference_mode():
                return net(x)

        return run

    return {"torch f32": call(model), "torch int8": call(int8)}


def onnx_calls(model: torch.nn.Module, x: torch.Tensor, folder: Path) -> dict[str, Call]:
    """ONNX Runtime and OpenVINO, as far as they are installed."""
    calls: dict[str, Call] = {}
    file = folder / "model.onnx"
    torch.onnx.export(model, (x,), str(file), input_names=["x"], dynamo=False, opset_version=17)
    value = x.numpy()
    if find_spec("onnxruntime") and not any(name in os.environ for name in RESTRICTED):
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        small = folder / "int8.onnx"
        quantize_dynamic(file, small, weight_type=QuantType.QInt8, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])
        calls["ort int8"] = lambda: session.run(None, {"x": value})
    if find_spec("openvino") and find_spec("nncf"):
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        core = openvino.Core()
        data = nncf.Dataset([value] * 2, lambda item: item)
        small = nncf.quantize(core.read_model(file), data, subset_size=2)
        config = {
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(small, "CPU", config)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(value))
        calls["openvino int8"] = request.infer
    return calls


def measure(calls: Mapping[str, Call], rounds: int) -> dict[str, tuple[float, float]]:
    """(median, quiet tenth) of each call, microseconds; contenders take turns.

    Each turn makes two calls and counts the second, so that nobody pays for the caches of the
    contender before.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            call()
            start = time.process_time()
            call()
            if turn:
                times[name].append((time.process_time() - start) * 1e6)
    return {n: (float(np.median(t)), float(np.percentile(t, 10))) for n, t in times.items()}


def contest(
    size: tuple[int, int, int],
    rank: int | None,
    rounds: int,
    families: list[str],
    peaks: Mapping[str, float],
) -> dict[str, Any]:
    """One row of the table."""
    m, n, k = size
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, k)).astype(np.float32)
    flags = cpu()[1]
    calls: dict[str, Call] = {}
    for name, (family, mcpu, needs) in FAMILIES.items():
        if needs <= flags and name in families:
            kernels = ours(family, mcpu, x, n, rank)
            calls |= {f"{name} {part}": call for part, call in kernels.items()}
    model = module(n, k, rank)
    given = torch.from_numpy(x.copy())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls |= torch_calls(model, given) | onnx_calls(model, given, Path(folder))
        times = measure(calls, rounds)
    row: dict[str, Any] = {"m": m, "n": n, "k": k, "rank": rank, "us": {}}
    for name, (median, quiet) in times.items():
        row["us"][name] = {"p50": round(median, 1), "p10": round(quiet, 1)}
    for name in FAMILIES:
        if f"{name} product" in times:
            macs = m * n * k if rank is None else m * rank * (n + k)
            if name in peaks:
                share = macs / times[f"{name} product"][0] * 1e6 / peaks[name]
                row.setdefault("share", {})[name] = round(share, 3)
            parts = [times[f"{name} {part}"] for part in ("quantize", "product")]
            total = [round(sum(p[i] for p in parts), 1) for i in (0, 1)]
            row["us"][name] = {"p50": total[0], "p10": total[1]}
    return row


def versions() -> dict[str, str]:
    """Versions of the contenders."""
    found = {"python": platform.python_version()}
    for name in ("torch", "apache-tvm", "onnxruntime", "openvino", "nncf"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Times the int8 linear kernels against peers.")
    parser.add_argument("--rounds", type=int, default=20)
    default = ["x86-amx", "x86-vnni", "x86-avx2"]
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=default)
    parser.add_argument("--ranks", nargs="*", type=int, default=list(RANKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TVM_NUM_THREADS"] = "1"  # read when the first parallel loop runs
    model, flags = cpu()
    shown = [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if f in flags]
    rows = []
    load = os.getloadavg()[0]
    peaks = {
        name: peak(family.rows.dot, mcpu)
        for name, (family, mcpu, needs) in FAMILIES.items()
        if isinstance(family, AbstractRowFamily) and needs <= flags and name in options.families
    }
    for size in SIZES:
        for rank in (None, *options.ranks):
            row = contest(size, rank, options.rounds, options.families, peaks)
            rows.append(row)
            label = "x".join(map(str, size)) + ("" if rank is None else f" r{rank}")
            shown_us = {
                n: t for n, t in row["us"].items() if not n.endswith(("quantize", "product"))
            }
            line = "  ".join(f"{n} {t['p50']:.0f}|{t['p10']:.0f}" for n, t in shown_us.items())
            shares = "  ".join(f"{n} {s:.0%} of peak" for n, s in row.get("share", {}).items())
            print(f"{label:20s} {line}  {shares}", flush=True)
    record = {
        "schema": 1,
        "what": "one linear layer, microseconds per call: p50 and p10 over the rounds",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/linear_kernels.py", *sys.argv[1:]]),
        "machine": {"cpu": model, "cores": os.cpu_count(), "features": shown, "load": load},
        "threads": 1,
        "rounds": options.rounds,
        "peak_gmacs": {name: round(value / 1e9, 1) for name, value in peaks.items()},
        "restricted": {name: os.environ[name] for name in RESTRICTED if name in os.environ},
        "versions": versions(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
