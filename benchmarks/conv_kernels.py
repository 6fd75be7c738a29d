"""Convolution kernels against OpenVINO int8, ONNX Runtime int8 and torch fp32, one thread.

Each unit is a piece of ResNet-50 that keeps its shape, chained with distinct weights so that data
flows; the time of a unit is the slope between two chain lengths, which removes everybody's float
input and output. Ours hands int8 codes with static ranges from convolution to convolution, as the
peers do. Calls are interleaved. Beside each time: the output's relative error to torch fp32, and
the share of what the family's multiply-add instructions reach when they do nothing else.

    python benchmarks/conv_kernels.py [--rounds 30] [--family x86-vnni] [--units text]

writes conv_kernels.json (of x86-avx2 conv_kernels_avx2.json and so on) beside this file. To hold
OpenVINO to the instructions of AVX2, set ONEDNN_MAX_CPU_ISA=AVX2 and DNNL_MAX_CPU_ISA=AVX2.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = "1"

import numpy as np
import torch
import tvm
from torch import nn

from t3c.codegen.kernels.conv_amx import AmxConv
from t3c.codegen.kernels.conv_avx2 import Avx2Conv
from t3c.codegen.kernels.conv_vnni import VnniConv
from t3c.codegen.kernels.emit import Emitter, buffer
from t3c.codegen.kernels.family import AbstractConvKernels, ConvShape, Flow, Image, Kernel
from t3c.codegen.script import read_function
from t3c.core.codes import quantize_weight
from t3c.core.grid import ends_of

Layer = tuple[int, int, int]
"""(input channels, output channels, kernel side)."""
Call = Callable[[], "np.ndarray[Any, Any]"]
UNITS: dict[str, tuple[int, tuple[Layer, ...]]] = {
    "1x1 64-256-64 @56": (56, ((64, 256, 1), (256, 64, 1))),
    "3x3 64 @56": (56, ((64, 64, 3),)),
    "1x1 128-512-128 @28": (28, ((128, 512, 1), (512, 128, 1))),
    "3x3 128 @28": (28, ((128, 128, 3),)),
    "1x1 256-1024-256 @14": (14, ((256, 1024, 1), (1024, 256, 1))),
    "3x3 256 @14": (14, ((256, 256, 3),)),
    "1x1 512-2048-512 @7": (7, ((512, 2048, 1), (2048, 512, 1))),
    "3x3 512 @7": (7, ((512, 512, 3),)),
    "Tucker-2 of 3x3 256 @14, r=64": (14, ((256, 64, 1), (64, 64, 3), (64, 256, 1))),
}
LENGTHS = (2, 6)
PICKS = (("cpu_median_us", 0, 50), ("cpu_quiet_us", 0, 10), ("wall_quiet_us", 1, 10))
"""(name, processor or wall time, percentile)."""
FAMILIES: dict[str, tuple[AbstractConvKernels, str]] = {
    "x86-vnni": (VnniConv(), "icelake-server"),
    "x86-amx": (AmxConv(), "sapphirerapids"),
    "x86-avx2": (Avx2Conv(), "x86-64-v3"),
}


class Chain(nn.Module):
    """Convolutions with ReLU, one after another."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        """Random weights."""
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, padding=k // 2) for a, b, k in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run every layer."""
        for conv in self.convs:
            x = torch.relu(conv(x))
        return x


def ours(model: Chain, x: np.ndarray[Any, Any], name: str) -> Call:
    """The chain on our kernels, called one by one: codes flow from the first to the last."""
    family, mcpu = FAMILIES[name]
    functions: dict[str, Any] = {}
    calls: list[tuple[str, list[Any]]] = []
    pool: dict[Any, Any] = {}  # two buffers of each shape take turns, as memory planning does

    def add(kernel: Kernel, inputs: list[Any]) -> Any:
        functions[kernel.name] = read_function(kernel.source)
        ((size, kind),) = kernel.outs
        made = pool.setdefault((size, kind, len(calls) % 2), _zeros(size, kind))
        calls.append((kernel.name, [*inputs, made]))
        return made

    convs = [conv for conv in model.convs if isinstance(conv, nn.Conv2d)]
    bits = family.activation_bits
    with torch.inference_mode():
        values = [torch.from_numpy(x)]
        for conv in convs:
            values.append(torch.relu(conv(values[-1])))
    ranges = [_range(float(value.max()) / ends_of(bits, signed=False)[1]) for value in values]
    images = [
        Image(1, value.shape[1], tuple(value.shape[2:]), conv.kernel_size[0] // 2, False, bits)
        for value, conv in zip(values[:-1], convs, strict=True)
    ]
    value = add(family.encode(images[0]), [tvm.runtime.tensor(x), ranges[0]])
    for i, conv in enumerate(convs):
        assert conv.bias is not None
        side = conv.kernel_size[0]
        pair = (conv.in_channels, conv.out_channels)
        pad = (side // 2, side // 2)
        shape = ConvShape(1, *pair, images[i].size, (side, side), (1, 1), pad, (1, 1))
        w = quantize_weight(conv.weight.detach().numpy())
        packed = [
            tvm.runtime.tensor(array)
            for array in family.pack(w, conv.bias.detach().numpy(), shape).values()
        ]
        last = i + 1 == len(convs)
        flow = Flow(shape, images[i], None if last else images[i + 1], floats=last)
        more = [] if last else [ranges[i + 1]]
        value = add(family.flow(flow, epilogue="relu"), [value, ranges[i], *packed, *more])
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu})
    module = tvm.compile(tvm.IRModule(functions), target=target)
    steps = [(module[name], arguments) for name, arguments in calls]

    def run() -> np.ndarray[Any, Any]:
        for function, arguments in steps:
            function(*arguments)
        return np.asarray(value.numpy())

    return run


def peers(model: Chain, x: np.ndarray[Any, Any], folder: Path) -> dict[str, Call]:
    """The chain on torch fp32, ONNX Runtime int8 and OpenVINO int8."""
    import nncf
    import onnxruntime as ort
    import openvino as ov
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    nncf.set_log_level(logging.ERROR)
    tensor = torch.from_numpy(x)

    def torch_run() -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            return np.asarray(model(tensor).numpy())

    def openvino_run() -> np.ndarray[Any, Any]:
        request.infer()
        return np.asarray(request.get_output_tensor(0).data)

    plain, coded = str(folder / "plain.onnx"), str(folder / "int8.onnx")
    torch.onnx.export(model, (tensor,), plain, input_names=["x"], output_names=["y"], dynamo=False)

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # no stubs
        """Two copies of the input."""

        def __init__(self) -> None:
            self.left = iter([{"x": x}] * 2)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    quantize_static(
        plain,
        coded,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(coded, options, providers=["CPUExecutionProvider"])
    core = ov.Core()
    quantized = nncf.quantize(
        core.read_model(plain), nncf.Dataset([x] * 2, lambda a: a), subset_size=2
    )
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(quantized, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(np.ascontiguousarray(x)))
    return {
        "torch fp32": torch_run,
        "ORT int8": lambda: np.asarray(session.run(None, {"x": x})[0]),
        "OpenVINO int8": openvino_run,
    }


def peak(family: str) -> float | None:
    """Multiply-adds a nanosecond of a loop over registers; None where there is no such loop."""
    if family == "x86-amx":
        return None
    wide = family == "x86-vnni"
    lanes, count, rounds = (16, 24, 100_000) if wide else (8, 12, 100_000)
    e = Emitter()
    vector = "T.ramp(0, 1, LANES)".replace("LANES", str(lanes))
    kind = f"int8x{4 * lanes}"
    a = e.let("a", f'T.reinterpret(x[{vector}], dtype="{kind}")')
    sums = [e.alloc("sum", (lanes,), "int32") for _ in range(count)]
    for name in sums:
        e(f"{name}[{vector}] = x[{vector}]")
    with e.loop("i", rounds):
        for name in sums:
            total = f"{name}[{vector}]"
            call = f'T.call_llvm_pure_intrin("int32x{lanes}", "llvm.x86.'
            if wide:
                e(f'{total} = {call}avx512.vpdpbusd.512", {total}, {a}, {a})')
            else:  # the product depends on the sum, so that no compiler takes it out of the loop
                b = f'T.reinterpret({total}, dtype="{kind}")'
                pairs = (
                    f'T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", {b}, {a})'
                )
                ones = "T.broadcast(T.int16(1), 16)"
                e(f'{total} = {total} + {call}avx2.pmadd.wd", {pairs}, {ones})')
    for name in sums:
        e(f"y[{vector}] = y[{vector}] + {name}[{vector}]")
    params = [buffer(name, (lanes,), "int32") for name in "xy"]
    functions = {"peak": read_function(e.function("peak", params))}
    target = tvm.target.Target({"kind": "llvm", "mcpu": FAMILIES[family][1]})
    run = tvm.compile(tvm.IRModule(functions), target=target)["peak"]
    x, y = (tvm.runtime.tensor(np.ones(lanes, np.int32)) for _ in range(2))
    times = []
    for _ in range(20):
        begin = time.process_time()
        run(x, y)
        times.append(time.process_time() - begin)
    macs = rounds * count * lanes * 4
    return macs / min(times) * 1e-9


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(processor, wall) microseconds of each call, `rounds` times, interleaved.

    Every call runs once before the timed one, as in a loop of its own. Processor time is that of
    the whole process, so that a peer's worker thread counts and other programs do not.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            begin, busy = time.perf_counter(), time.process_time()
            call()
            busy, wall = time.process_time() - busy, time.perf_counter() - begin
            found[name].append((busy * 1e6, wall * 1e6))
    return found


def main() -> None:
    """Measure every unit, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--family", choices=FAMILIES, default="x86-vnni")
    parser.add_argument("--units", default="", help="only units whose name contains this")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    me = f"T3C {options.family}"
    best = peak(options.family)
    rows = []
    for unit, (side, layers) in UNITS.items():
        if options.units not in unit:
            continue
        calls: dict[str, Call] = {}
        with tempfile.TemporaryDirectory() as folder:
            for length in LENGTHS:
                model = Chain(layers * length).eval()
                x = torch.rand(1, layers[0][0], side, side).numpy()
                calls[f"{me}@{length}"] = ours(model, x, options.family)
                for name, call in peers(model, x, Path(folder)).items():
                    calls[f"{name}@{length}"] = call
        errors = {}
        for name in (me, "OpenVINO int8", "ORT int8"):
            got, want = calls[f"{name}@{LENGTHS[0]}"](), calls[f"torch fp32@{LENGTHS[0]}"]()
            errors[name] = round(float(np.linalg.norm(got - want) / np.linalg.norm(want)), 5)
        times = measure(calls, options.rounds)
        row: dict[str, Any] = {"unit": unit, "error": errors}
        short, long = LENGTHS
        for name in (me, "OpenVINO int8", "ORT int8", "torch fp32"):
            for label, kind, pick in PICKS:
                ends = []
                for length in LENGTHS:
                    column = [pair[kind] for pair in times[f"{name}@{length}"]]
                    ends.append(float(np.percentile(column, pick)))
                slope = (ends[1] - ends[0]) / (long - short)
                row.setdefault(label, {})[name] = round(slope, 1)
        rows.append(row)
        quiet = row["cpu_quiet_us"]
        row["ratio_to_openvino"] = {
            label: round(row[label][me] / row[label]["OpenVINO int8"], 3) for label, _, _ in PICKS
        }
        macs = sum(a * b * k * k for a, b, k in layers) * side * side
        row["gmac_s"] = {name: round(macs / us * 1e-3, 1) for name, us in quiet.items()}
        if best is not None:
            row["share_of_peak"] = round(macs / quiet[me] * 1e-3 / best, 3)
        cells = [
            f"{name} " + ", ".join(f"{row[label][name]:.0f}" for label, _, _ in PICKS)
            for name in (me, "OpenVINO int8", "ORT int8", "torch fp32")
        ]
        ratios = "/".join(f"{ratio:.2f}" for ratio in row["ratio_to_openvino"].values())
        print(f"{unit:32s} {ratios} | " + " | ".join(cells) + f" | {errors}", flush=True)
    model_name = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    flags = Path("/proc/cpuinfo").read_text()
    report = {
        "schema": 1,
        "what": "microseconds a unit: slope between chains of "
        f"{LENGTHS[0]} and {LENGTHS[1]} units, distinct weights, interleaved calls; "
        "cpu: processor time of the process, wall: clock",
        "machine": model_name,
        "amx": "amx_int8" in flags,
        "avx512_vnni": "avx512_vnni" in flags,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": 1,
        "rounds": options.rounds,
        "peak_gmac_s": None if best is None else round(best, 1),
        "peers_held_to": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/conv_kernels.py " + " ".join(sys.argv[1:]),
        "versions": {name: _version(name) for name in ("torch", "onnxruntime", "openvino")},
        "rows": rows,
    }
    level = options.family.removeprefix("x86-").replace("-", "_")
    ending = "" if level == "vnni" else f"_{level}"
    path = Path(__file__).with_name(f"conv_kernels{ending}.json")
    path.write_text(json.dumps(report, indent=1) + "\n")


def _range(scale: float) -> Any:
    return tvm.runtime.tensor(np.array([scale, 1 / scale] + [0] * 14, np.float32))


def _zeros(size: tuple[int, ...], kind: str) -> Any:
    return tvm.runtime.tensor(np.zeros(size, kind))


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
