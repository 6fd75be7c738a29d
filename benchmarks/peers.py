"""A whole network against the int8 runtimes of the same machine, in one run.

    python benchmarks/peers.py vit_b16 [--threads 1] [--rounds 30] [--artifact folder]

Every contestant gets the same input and the same number of threads, is warm, and is called in
turn, so that noise meets all alike. Error is the relative L2 distance of the first output to torch
float32. ONNX Runtime runs its dynamic and its static int8 form (the better one counts); OpenVINO's
int8 is calibrated by NNCF on the example input. Results go to benchmarks/peers-<model>.json.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Run = Callable[[], Any]


def main() -> None:
    """Parse, fix the threads, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a function of examples/models.py")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--artifact", type=Path, help="lowered before; else it is lowered now")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    sys.path.insert(0, str(HERE.parent))
    warnings.filterwarnings("ignore")
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Build all contestants, time them in turn, write and print the table."""
    import numpy as np
    import torch
    from rich.console import Console

    import t3c
    from examples import models
    from t3c.report import tables

    torch.set_num_threads(options.threads)
    model, inputs = models.ALL[options.model]()
    with tempfile.TemporaryDirectory() as scratch:
        artifact = options.artifact or t3c.lower(
            model, target="x86", example_inputs=inputs, out=Path(scratch) / "artifact", calls=0
        )
        session = t3c.load(artifact)
        names = [p.name for p in session.profiles]
        runs: dict[str, Run] = {}
        runs |= torch_runs(model, inputs)
        for peer in (onnxruntime_runs, openvino_runs):
            if peer.__name__.removesuffix("_runs") not in options.without:
                runs |= peer(model, inputs, Path(scratch), options.threads)
        runs |= {f"t3c {n}": _bound(session.variants[n], inputs) for n in names}
        with torch.inference_mode():
            results = {name: np.asarray(_first(run()), np.float64) for name, run in runs.items()}
            seconds = _turns(runs, options.rounds)
    want = results["torch fp32"]
    rows = [
        {
            "": name,
            "p50 ms": float(np.median(seconds[name]) * 1e3),
            "quiet tenth ms": float(np.quantile(seconds[name], 0.1) * 1e3),
            "p95 ms": float(np.quantile(seconds[name], 0.95) * 1e3),
            "x fp32": float(np.median(seconds["torch fp32"]) / np.median(seconds[name])),
            "error": float(np.linalg.norm(results[name] - want) / np.linalg.norm(want)),
        }
        for name in runs
    ]
    Console().print(tables.plain(rows, f"{options.model}, {options.threads} thread(s)"))
    manifest = session.manifest
    record = {
        "command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"mcpu": manifest.target.mcpu, "features": list(manifest.target.features)},
        "load": os.getloadavg()[0],
        "threads": options.threads,
        "rounds": options.rounds,
        "versions": _versions(),
        "rows": rows,
    }
    file = HERE / f"peers-{options.model}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")


def _bound(variant: Callable[..., Any], inputs: tuple[Any, ...]) -> Run:
    return lambda: variant(*inputs)


def _first(result: Any) -> Any:
    """The first output, whatever the structure."""
    while isinstance(result, dict | tuple | list):
        result = next(iter(result.values())) if isinstance(result, dict) else result[0]
    return result


def _turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    import time

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-3, rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def torch_runs(model: Any, inputs: tuple[Any, ...]) -> dict[str, Run]:
    """Eager float32 and dynamic int8 with the fast engine."""
    import copy

    import torch

    torch.backends.quantized.engine = "onednn"
    int8: Any = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8
    )
    return {"torch fp32": lambda: model(*inputs), "torch int8": lambda: int8(*inputs)}


def _exported(model: Any, inputs: tuple[Any, ...], folder: Path) -> tuple[Path, dict[str, Any]]:
    """The model as ONNX with one output, and its inputs as numpy."""
    import torch

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any) -> Any:
            return _first(dict(self.model(*args)))

    path = folder / "model.onnx"
    names = [f"input{i}" for i in range(len(inputs))]
    if not path.exists():
        torch.onnx.export(
            First().eval(), inputs, str(path), input_names=names, opset_version=17, dynamo=False
        )
    return path, {n: x.numpy() for n, x in zip(names, inputs, strict=True)}


def onnxruntime_runs(
    model: Any, inputs: tuple[Any, ...], folder: Path, threads: int
) -> dict[str, Run]:
    """Float32, dynamic int8 and static int8 (QDQ, per channel)."""
    import onnxruntime as ort
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, given = _exported(model, inputs, folder)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([given, given])

        def get_next(self) -> Any:
            return next(self.left, None)

    def session(file: Path) -> Run:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        made = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return lambda: made.run(None, given)

    runs = {"ORT fp32": session(path)}
    dynamic, ready, static = (folder / f"{n}.onnx" for n in ("dynamic", "ready", "static"))
    quantize_dynamic(str(path), str(dynamic), weight_type=QuantType.QInt8, per_channel=True)
    runs["ORT int8 dynamic"] = session(dynamic)
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(static),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    runs["ORT int8 static"] = session(static)
    return runs


def openvino_runs(
    model: Any, inputs: tuple[Any, ...], folder: Path, threads: int
) -> dict[str, Run]:
    """Int8 by NNCF, with latency as the goal."""
    import logging

    import nncf
    import openvino as ov
    import torch

    nncf.set_log_level(logging.ERROR)
    path, given = _exported(model, inputs, folder)
    core = ov.Core()
    normed = any(isinstance(m, torch.nn.LayerNorm) for m in model.modules())
    transformer = {"model_type": nncf.ModelType.TRANSFORMER} if normed else {}
    quantized = nncf.quantize(
        core.read_model(str(path)), nncf.Dataset([given] * 2), subset_size=2, **transformer
    )
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(quantized, "CPU", settings)
    request = compiled.create_infer_request()
    for name, value in given.items():
        request.set_tensor(name, ov.Tensor(value))

    def run() -> Any:
        request.infer()
        return [request.get_output_tensor(0).data]

    return {"OpenVINO int8": run}


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "apache-tvm", "onnxruntime", "openvino", "nncf"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
