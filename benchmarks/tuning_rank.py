"""Whether the rank of a low-rank kernel may be an argument: time and bytes of code, one thread.

    python benchmarks/tuning_rank.py

The text of the VNNI kernel of the largest rank, its three loops over the rank bounded by an
argument, against the kernels made for each rank (multiples of 64: other ranks need blocks of their
own). Weights are cold, contestants take turns. Written into tuning.json.
"""

import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tuning import store

from t3c.codegen.kernels import linear_rows
from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.linear_vnni import VnniLinear
from t3c.codegen.script import read_function
from t3c.codegen.tune.inproc import contestant
from t3c.codegen.tune.measure import Arguments, Contestant, contest, ratio
from t3c.codegen.tvm_api import make_target, tvm

SIZES = ((197, 768, 768), (197, 3072, 768), (197, 768, 3072), (128, 768, 768))
MOST = 320
RANKS = (64, 128, 256)
FAMILY = VnniLinear()


def with_rank_argument(kernel: Kernel) -> Kernel:
    """The kernel of rank `MOST` that runs its loops over the rank to ``rank[0] // 64``.

    `MOST` is chosen so that MOST / 64 = 5 bounds no other of these loops at these sizes.
    """
    loops = re.compile(rf"(for (?:n|k|block)\d+ in )range\({MOST // 64}\)")
    source, count = loops.subn(r"\1range(rank[0] // 64)", kernel.source)
    if count < 4:  # panels, two passes of the quantization, depth of the second product
        raise ValueError(f"{kernel.name}: {count} loops over the rank, expected 4 or more")
    source = source.replace("(\n", '(\n    rank: T.Buffer((1,), "int32"),\n', 1)
    name = f"{kernel.name}_any"
    return Kernel(name, source.replace(kernel.name, name), kernel.outs)


def compiled(kernels: list[Kernel], target: Any) -> tuple[list[Contestant], int]:
    """Each kernel alone, and the bytes of a library that holds them all."""
    functions = {k.name: read_function(k.source) for k in kernels}
    made = [contestant(tvm.IRModule({name: f}), target) for name, f in functions.items()]
    with (
        tempfile.TemporaryDirectory() as folder,
        tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}),
    ):
        path = Path(folder) / "all.so"
        tvm.compile(tvm.IRModule(functions), target=target).export_library(
            str(path), options=["-s"]
        )
        return made, path.stat().st_size


def bound(kernel: Contestant, rank: int) -> Contestant:
    """The kernel with its rank argument filled in."""
    value = tvm.runtime.tensor(np.array([rank], np.int32))
    return Contestant(lambda *rest: kernel.function(value, *rest), kernel.params[1:])


def main() -> None:
    """Contests and JSON."""
    os.environ["TVM_NUM_THREADS"] = "1"
    linear_rows.WORTH_US = math.inf  # no tasks for threads: their number follows the rank
    target = make_target({"kind": "llvm", "mcpu": "icelake-server"})
    rows = []
    for m, n, k in SIZES:
        static = [FAMILY.low_rank(m, n, k, rank, MOST) for rank in RANKS]
        any_rank = with_rank_argument(FAMILY.low_rank(m, n, k, MOST, MOST))
        made, separate = compiled(static, target)
        ((one,), shared) = compiled([any_rank], target)
        row: dict[str, Any] = {"m": m, "n": n, "k": k, "bytes": separate, "bytes_any": shared}
        for rank, kernel in zip(RANKS, made, strict=True):
            pair = [kernel, bound(one, rank)]
            base, found = contest(pair, Arguments(), np.random.default_rng(0), 2.0, (20, 200))
            r = ratio(found, base)
            row[f"r{rank}"] = {
                "us": round(float(np.median(base)) * 1e6, 1),
                "ratio": round(r.median, 3),
            }
            row[f"r{rank}"] |= {"interval": [round(r.low, 3), round(r.high, 3)]}
        rows.append(row)
        print(row, flush=True)
    store("x86-vnni", {"rank_argument": {"rows": rows}})


if __name__ == "__main__":
    main()
