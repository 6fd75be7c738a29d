"""The machine's int8 peak and read bandwidth, one thread, from a loop compiled on the spot."""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Collection
from functools import cache
from pathlib import Path

import numpy as np

from t3c.runtime.host import allow_tiles

SOURCE = Path(__file__).with_suffix(".c")
LOOPS = (("amx_int8", "peak_amx_int8"), ("avx512_vnni", "peak_avx512_vnni"), ("avx2", "peak_avx2"))
"""CPU feature -> loop of its int8 product, best first."""
STEPS = 2_000_000
STREAM = 128 << 20
"""Bytes read: several times a large last cache."""
REPEATS = 15


def int8_peak(features: Collection[str]) -> float:
    """Multiply-adds a second of the best int8 product among these features; the best of repeats.

    Raises:
        ValueError: None of the features has an int8 product that is known here.
    """
    for feature, name in LOOPS:
        if feature in features:
            if feature == "amx_int8":
                allow_tiles()
            loop = getattr(_library(), name)
            loop.restype, loop.argtypes = ctypes.c_double, [ctypes.c_long]
            return float(max(loop(STEPS) for _ in range(REPEATS)))
    known = ", ".join(feature for feature, _ in LOOPS)
    raise ValueError(f"no int8 product among {sorted(features)}; known are {known}")


def read_bandwidth() -> float:
    """Bytes read a second from memory that no cache holds; the best of repeats."""
    data = np.ones(STREAM // 8, np.uint64)
    sink = ctypes.c_uint64()
    loop = _library().read_bandwidth
    loop.restype = ctypes.c_double
    loop.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.POINTER(ctypes.c_uint64)]
    return float(max(loop(data.ctypes.data, len(data), ctypes.byref(sink)) for _ in range(REPEATS)))


@cache
def _library() -> ctypes.CDLL:
    folder = tempfile.mkdtemp()
    made = Path(folder) / "limits.so"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(made))
