"""Where OpenVINO's time goes: its own profile of every node, grouped as `benchmarks.layers` groups.

    python -m benchmarks.peer_layers build/benchmarks/resnet50/ov-mixed.xml [--calls 30]

The kernel names show which instructions ran (``brgemm_avx512``, ``jit_avx2``), so this also tells
whether a restriction took effect.
"""

import argparse
import json
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.turns import quiet

GROUPS = {
    "Convolution": "GEMM and convolution",
    "FullyConnected": "GEMM and convolution",
    "FullyConnectedQuantizedLegacy": "GEMM and convolution",
    "MatMul": "attention",
    "ScaledDotProductAttention": "attention",
    "Softmax": "attention",
    "MVN": "norm",
    "LayerNormalization": "norm",
    "RMS": "norm",
    "Reorder": "layout",
    "Transpose": "layout",
    "Reshape": "layout",
    "FakeQuantize": "quantize",
    "Convert": "quantize",
}
"""OpenVINO's node type -> group; everything else is element-wise."""


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lock", type=Path, help="held while timing")
    parser.add_argument("--cpus", type=int, nargs="*", default=[])
    options = parser.parse_args()
    found = measure(options)
    for row in found["groups"]:
        print(f"{row['group']:24s} {row['us']:9.0f} us  {row['share']:6.1%}")
    for row in found["nodes"]:
        print(f"{row['type']:28s} {row['kernel']:28s} {row['calls']:4d}  {row['us']:9.0f} us")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median microseconds of every kind of node in one call, and of the groups."""
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": options.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": True,
    }
    compiled = core.compile_model(core.read_model(str(options.model)), "CPU", settings)
    request = compiled.create_infer_request()
    draw = np.random.default_rng(0)
    for i, port in enumerate(compiled.inputs):
        kind = port.element_type.to_dtype()
        whole = np.issubdtype(kind, np.integer)
        value = np.ones(port.shape, kind) if whole else draw.standard_normal(port.shape)
        request.set_input_tensor(i, ov.Tensor(np.ascontiguousarray(value, kind)))
    request.infer()
    rounds: list[dict[tuple[str, str], float]] = []
    counts: Counter[tuple[str, str]] = Counter()
    with quiet(options.lock, options.cpus):
        for turn in range(options.calls):
            request.infer()
            now: dict[tuple[str, str], float] = defaultdict(float)
            for node in request.profiling_info:
                key = (node.node_type, node.exec_type)
                now[key] += node.real_time.total_seconds() * 1e6
                counts[key] += turn == 0
            rounds.append(now)
    nodes = [
        {
            "type": kind,
            "kernel": how,
            "calls": calls,
            "us": statistics.median(r[kind, how] for r in rounds),
            "group": GROUPS.get(kind, "element-wise"),
        }
        for (kind, how), calls in counts.items()
    ]
    nodes = sorted((n for n in nodes if n["us"] > 0), key=lambda n: -n["us"])
    total = sum(n["us"] for n in nodes)
    groups = [
        {"group": g, "us": us, "share": us / total}
        for g in dict.fromkeys(n["group"] for n in nodes)
        if (us := sum(n["us"] for n in nodes if n["group"] == g))
    ]
    return {"schema": 1, "us": total, "groups": groups, "nodes": nodes}


if __name__ == "__main__":
    main()
