"""Lowered libraries that several benchmarks share: made once, kept in build/libraries.

    python -m benchmarks.libraries            # MiniLM and ResNet-18, a minute each

MiniLM is lowered as examples/demo_minilm.py does it: trained weights, calibrated on docstrings.
ResNet-18 has random weights: its times mean something, its drift does not.
"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "libraries"
NAMES = ("minilm", "resnet18")
CALIBRATION = 24
"""Docstrings behind MiniLM's library; the demonstration takes more."""
PLAN_SECONDS = 20.0


def library(name: str, folder: Path | None = None) -> Path:
    """The folder of a lowered network; lowers it where it is missing.

    Args:
        name: One of `NAMES`.
        folder: An artifact made before; None: the kept one.
    """
    if folder is not None:
        return folder
    demo = ROOT / "demo-out" / "minilm"
    if name == "minilm" and (demo / "manifest.json").is_file():
        return demo
    kept = FOLDER / name
    if not (kept / "manifest.json").is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        _lower(name, kept)
    return kept


def one_thread() -> None:
    """Let torch and TVM use one thread; call it before they are imported."""
    for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ[name] = "1"


def inputs(name: str, count: int = 1) -> list[tuple[Any, ...]]:
    """Arguments of so many calls: docstrings for MiniLM, random images for ResNet-18."""
    if name == "minilm":
        from examples import docstrings
        from examples.demo_minilm import _tokenizer  # pyright: ignore[reportPrivateUsage]

        encode = _tokenizer()
        return [encode(first) for first, _ in docstrings.halves(count)]
    import torch

    draws = (torch.Generator().manual_seed(1000 + i) for i in range(count))
    return [(torch.randn(1, 3, 224, 224, generator=draw),) for draw in draws]


def _lower(name: str, out: Path) -> None:
    import t3c
    from examples import models

    model, _ = (models.minilm if name == "minilm" else models.resnet18)()
    calls = inputs(name, CALIBRATION if name == "minilm" else 4)
    t3c.lower(
        model,
        example_inputs=calls[0],
        calibration=calls,
        out=out,
        plan_seconds=PLAN_SECONDS,
        say=lambda line: print(f"{name}: {line}", file=sys.stderr),
    )


if __name__ == "__main__":
    one_thread()
    for each in NAMES:
        print(library(each))
