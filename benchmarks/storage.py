"""What one array for two widths costs in drift and saves in bytes, on MiniLM.

    python -m benchmarks.storage [--pairs 60] [--only bytes]

Drift: all 36 linear layers dense, in 8 or in 4 bits, codes from independent arrays (rounded to
nearest, and with error feedback) or nested ones; unit embeddings of held-out docstrings against
float32, weights and activations integers, in torch as the kernels compute it. Bytes: MiniLM lowered
for bytes, with nested codes and with an array for each width; what every profile reads of the
weight file, what the largest one does not read, each profile exported alone, and the whole artifact
packed for transfer.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import t3c
from benchmarks.frontier import CALIBRATION, Encoder, Judge, batches_of, texts
from benchmarks.machine import describe
from examples import models
from t3c.api import elasticize
from t3c.controller.calibrate import collect
from t3c.core.code_storage import CodeStorage
from t3c.core.formats import Dense
from t3c.elastic.model import ElasticModel
from t3c.elastic.rounding import round_groups, round_nested, round_rows
from t3c.runtime.storage import storage

RESULTS = Path(__file__).resolve().parent / "results"
PROFILES = 8
PARTS = ("drift", "bytes")


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60, help="held-out docstrings, in fours")
    parser.add_argument("--only", choices=list(PARTS), help="the other part stays as recorded")
    parser.add_argument("--out", type=Path, default=RESULTS / "storage.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    held, other = texts(options.pairs)
    parts = PARTS if options.only is None else (options.only,)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.only else {}
    result |= {f"run of {part}": describe() for part in parts}
    if "drift" in parts:
        result["drift"] = drift(held, other[:CALIBRATION])
    if "bytes" in parts:
        found = {codes: lowered(other[:64], codes) for codes in CodeStorage}
        nested, apart = (found[codes]["file"] for codes in CodeStorage)
        result |= {"bytes": found, "independent_over_nested_file": apart / nested}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def drift(held: list[str], other: list[str]) -> dict[str, Any]:
    """Mean drift of every way to round, and of nested codes over independent ones."""
    calibration = batches_of(other)
    elastic = elasticize(Encoder(models.minilm()[0]).eval(), calibration[0])
    judge = Judge(elastic, batches_of(held))
    seen = collect(elastic, calibration)
    whole = {bits: dict.fromkeys(elastic.sites, Dense(bits)) for bits in (8, 4)}
    rows: dict[str, Any] = {"texts": len(held), "points": []}

    def look(name: str) -> dict[int, float]:
        points = {b: judge(f"int{b}, {name}", elastic, whole[b]) for b in (8, 4)}
        rows["points"] += [asdict(p) for p in points.values()]
        return {b: p.drift for b, p in points.items()}

    look("nearest")
    for name, layer in elastic.layers.items():
        moment = seen[name].mean()
        layer.set_codes("weight", round_rows(layer.weight, moment))
        layer.set_codes("weight", round_groups(layer.weight, moment, search=True))
    independent = look("error feedback")
    for name, layer in elastic.layers.items():
        layer.set_nested(round_nested(layer.weight, seen[name].mean()))
    nested = look("nested")
    rows["weights"] = _entropies(elastic)
    rows["nested_over_independent"] = {f"int{b}": nested[b] / independent[b] for b in (8, 4)}
    print(json.dumps(rows["nested_over_independent"]))
    return rows


def _entropies(elastic: ElasticModel) -> dict[str, float]:
    """Mean bits of information in a code of each width, all layers together."""

    def bits(codes: Tensor) -> float:
        _, counts = codes.unique(return_counts=True)
        share = counts.double() / counts.sum()
        return float(-(share * share.log2()).sum())

    found = {}
    for width in (8, 4):
        planes = [layer.codes_of("weight", width)[0].flatten() for layer in elastic.layers.values()]
        found[f"int{width}"] = bits(torch.cat(planes))
    return found


def lowered(other: list[str], codes: CodeStorage) -> dict[str, Any]:
    """The bytes of an artifact that is planned for bytes."""
    model, _ = models.minilm()
    calls = [tuple(part[:1] for part in batch) for batch in batches_of(other)]
    with tempfile.TemporaryDirectory() as folder:
        artifact = t3c.lower(
            model,
            "x86",
            calls[0],
            Path(folder) / "net",
            calibration=calls,
            profiles=PROFILES,
            objective="bytes",
            codes=codes,
            tables=True,
            calls=0,
            say=lambda line: None,
        )
        found = storage(artifact)
        exported = {
            row.name: t3c.export(artifact, [row.name], Path(folder) / row.name)
            for row in found.profiles
        }
        packed = t3c.pack(artifact, Path(folder) / "net.zip")
        return {
            "file": found.file,
            "profiles": [
                asdict(row) | {"exported": exported[row.name].weights.stat().st_size}
                for row in found.profiles
            ],
            "duplicates": found.duplicates,
            "file_over_largest_and_duplicates": found.overhead,
            "packed": [asdict(row) for row in packed],
        }


if __name__ == "__main__":
    main()
