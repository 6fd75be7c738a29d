"""The main job on a real model: MiniLM becomes one library in which every budget is compiled.

Lowers the trained sentence encoder for this machine, runs every profile on real text, and compares
speed, drift and retrieval with torch float32 and torch int8 on the same threads.

    python examples/demo_minilm.py [--threads 1] [--out demo-out]
"""

import argparse
import json
import os
import time
from importlib.resources import files
from pathlib import Path

TOKENS = 128
PAIRS = 300
CALIBRATION = 48


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--target", default="x86")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ[name] = str(options.threads)  # before torch and tvm start their threads
    run(options)


def run(options: argparse.Namespace) -> None:
    """Lower, evaluate, time, print, plot."""
    import numpy as np
    import torch

    import t3c
    from examples import docstrings, models
    from t3c.report import plots, tables

    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    model, _ = models.minilm()
    pairs = docstrings.halves(PAIRS + CALIBRATION)
    held_out, calibration = pairs[:PAIRS], pairs[PAIRS:]
    raise SystemExit((np, t3c, plots, tables, held_out, calibration, began, json, files, model))


if __name__ == "__main__":
    main()
