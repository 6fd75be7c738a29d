"""Where the time of a network goes: every kernel against the machine's int8 peak and bandwidth.

    python -m benchmarks.layers build/benchmarks/vit_b16/checks-native [--profile max] [--out file]

The artifact is one that `t3c.lower` kept as `checks`: its library has traces. Peak and bandwidth
are measured in the same run: a loop of the widest int8 product in registers, and a sum over an
array larger than the last cache. Kernels are timed by the processor's cycle counter between them,
lower quartile over calls; what their sum lacks to a plain call is the call itself: binding of
inputs and outputs. Multiply-adds come from the sizes in a kernel's name.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.limits import int8_peak, read_bandwidth
from benchmarks.turns import quiet
from t3c.core.probe import Trace
from t3c.runtime.session import Session, load

GROUPS = (
    ("attention", r"attention|softmax"),
    ("norm", r"layer_norm|rms_norm|norm"),
    ("quantize", r"quantize|image_encode|image_decode"),
    ("GEMM and convolution", r"linear|conv|flow|matmul|gemv"),
    ("layout", r"transpose|reshape|concat|strided_slice|permute|take|pad|stack|split|expand"),
    ("element-wise", r""),
)
"""Group -> pattern of kernel names; the first that fits."""


WARM = 3
"""Calls before those that count."""
QUIET = 0.25
"""Quantile of the times that counts, so that a busy neighbour does not."""


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--profile", default="max")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lock", type=Path, help="held while timing")
    parser.add_argument("--cpus", type=int, nargs="*", default=[])
    options = parser.parse_args()
    session = load(options.artifact, hashes=False)
    target = session.manifest.target
    traces = json.loads((options.artifact / "traces.json").read_text())
    inputs = [_input(s.shape, s.dtype) for s in session.manifest.inputs]
    variant = session.variants[options.profile]
    variant(*inputs)
    with quiet(options.lock, options.cpus):
        load_average = os.getloadavg()[0]
        plain = _quiet(lambda: variant(*inputs), options.calls)
        kernels = trace(session, traces[options.profile], options.profile, inputs, options.calls)
        after = _quiet(lambda: variant(*inputs), options.calls)
        macs_s, bytes_s = int8_peak(target.features), read_bandwidth()
    rows = [k.row(macs_s, bytes_s) for k in kernels]
    total = min(plain, after)
    record = {
        "schema": 1,
        "machine": {**machine.describe(), "load_average": load_average},
        "target": target.name,
        "profile": options.profile,
        "threads": int(os.environ.get("TVM_NUM_THREADS", os.cpu_count() or 1)),
        "int8_peak_macs_s": macs_s,
        "read_bytes_s": bytes_s,
        "call_us": total * 1e6,
        "groups": groups(rows, total * 1e6),
        "kernels": sorted(rows, key=lambda row: -row["us"]),
    }
    show(record)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def _input(shape: tuple[int, ...], dtype: str) -> Any:
    draw = np.random.default_rng(0)
    if "int" in dtype:
        return np.ones(shape, dtype)
    return draw.standard_normal(shape).astype(dtype)


def _quiet(run: Callable[[], Any], calls: int) -> float:
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return float(np.quantile(found, QUIET))


@dataclass(slots=True)
class Seen:
    """One kernel of a profile: all its calls in one run of the network."""

    name: str
    calls: int = 0
    seconds: list[float] = field(default_factory=list)

    def row(self, macs_s: float, bytes_s: float) -> dict[str, Any]:
        """Time, work and shares: of the int8 peak, and of bandwidth for the weights it reads."""
        seconds = float(np.quantile(self.seconds, QUIET))
        macs = multiply_adds(self.name) * self.calls
        return {
            "name": self.name,
            "group": group_of(self.name),
            "calls": self.calls,
            "us": seconds * 1e6,
            "macs": macs,
            "peak": macs / seconds / macs_s,
            "bandwidth": weight_bytes(self.name) * self.calls / seconds / bytes_s,
        }


def trace(
    session: Session, found: Mapping[str, Any], profile: str, inputs: list[Any], calls: int
) -> list[Seen]:
    """Every kernel with its time in each of `calls` runs."""
    noted = Trace(**{key: v if isinstance(v, str) else tuple(v) for key, v in found.items()})
    seen: dict[str, Seen] = {}
    for name in noted.kernels:
        seen.setdefault(name, Seen(name)).calls += 1
    for times in session.trace(noted, profile, inputs, calls + WARM)[WARM:]:
        now = dict.fromkeys(seen, 0.0)
        for name, seconds in zip(noted.kernels, times, strict=True):
            now[name] += seconds
        for name, seconds in now.items():
            seen[name].seconds.append(seconds)
    return list(seen.values())


def group_of(name: str) -> str:
    """The first group whose pattern fits."""
    return next(group for group, pattern in GROUPS if re.search(pattern, name))


def multiply_adds(name: str) -> int:
    """Multiply-adds of one call, read off the name; 0 where there are none."""
    if linear := re.search(r"linear_\w+?_(dense|low_rank)_m(\d+)_n(\d+)_k(\d+)(_r(\d+))?", name):
        m, n, k = map(int, linear.group(2, 3, 4))
        return m * n * k if linear[1] == "dense" else m * int(linear[6]) * (n + k)
    pattern = r"(?:conv|flow)_o(\d+)\w*?_1x(\d+)x(\d+)x(\d+)\w*?_k(\d+)x(\d+)_s(\d+)x(\d+)"
    if conv := re.search(pattern, name):
        out, channels, high, wide, kh, kw, sh, sw = map(int, conv.groups())
        return out * channels * kh * kw * -(-high // sh) * -(-wide // sw)
    if attention := re.match(r"attention\w*?_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_", name):
        batch, heads, _, queries, keys, depth, value = map(int, attention.groups())
        return batch * heads * queries * keys * (depth + value)
    return 0


def weight_bytes(name: str) -> int:
    """Bytes of int8 weights that one call reads, read off the name; 0 where there are none."""
    if linear := re.search(r"linear_\w+?_(dense|low_rank)_m(\d+)_n(\d+)_k(\d+)(_r(\d+))?", name):
        n, k = map(int, linear.group(3, 4))
        return n * k if linear[1] == "dense" else int(linear[6]) * (n + k)
    if conv := re.search(r"(?:conv|flow)_o(\d+)\w*?_1x(\d+)x\d+x\d+\w*?_k(\d+)x(\d+)_", name):
        out, channels, high, wide = map(int, conv.groups())
        return out * channels * high * wide
    return 0


def groups(rows: list[dict[str, Any]], total: float) -> list[dict[str, Any]]:
    """Microseconds and share of the call for each group; the rest is the call."""
    found = []
    measured = 0.0
    for group, _ in GROUPS:
        us = sum(row["us"] for row in rows if row["group"] == group)
        measured += us
        found.append({"group": group, "us": us, "share": us / total})
    rest = max(0.0, total - measured)
    found.append({"group": "the call itself", "us": rest, "share": rest / total})
    return found


def show(record: dict[str, Any]) -> None:
    """Print groups and the twenty longest kernels."""
    from rich.console import Console

    from t3c.report import tables

    console = Console(width=160)
    call = f"{record['profile']} on {record['target']}: {record['call_us']:.0f} us"
    console.print(tables.plain(record["groups"], call))
    shown = [{k: v for k, v in row.items() if k != "group"} for row in record["kernels"][:20]]
    console.print(tables.plain(shown, "longest kernels"))


if __name__ == "__main__":
    sys.exit(main())
