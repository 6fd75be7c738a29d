"""What certificates are worth: proxies against drift, conformal bounds against new data.

    python -m benchmarks.certificates [--model minilm | glyphs] [--held 64] [--scores 1200]

Proxies: Pearson correlation with the mean observed drift ||dz||_2 over plans (torch, rounding as
the kernels do), with the interval of Fisher's z; drift is seen on inputs that nothing else used.
Two groups are told apart: plans that can be shipped, which are the distinct profiles of the chains
for every objective (one artifact holds one chain: each counts alone, too), and a stress of other
plans, uniform and random, beside the latency chain.
Bounds: drifts of the compiled library on `--scores` inputs, split at random many times into a half
that gives the bound and one that tests it. Bounds for each input are taught by half of the half
that gives them, or, where there is such data, by all training images. Shifted: bounds from one kind
of data, tested on another. Texts: the standard library's docstrings, then other packages'. Glyphs:
test fonts, then the same with noise, slanted, and the validation fonts.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CALIBRATION = 48
UNIFORM = 8
MIXED = 12
PLANS = 36
"""At least so many in the stress; mixed ones fill up."""
CHAIN = 16
"""Profiles of the chain for each objective."""
GLYPHS = 1024
BATCH = 32
"""Images of a call."""
SPLITS = 400
SINGLE_SPLITS = 40
LEVELS = (0.9, 0.95, 0.99)
VARIANTS = (
    "operator-norm",
    "jacobian-rms",
    "jacobian-rms-rss",
    "kronecker",
    "kronecker-rss",
    "measured",
)
OTHERS = ("numpy", "torch", "networkx", "transformers", "matplotlib", "onnx", "rich")
"""Packages whose docstrings stand for another domain."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model with data that play different parts; calls are tuples of tensors.

    Attributes:
        name: What it is, in words.
        model: The original.
        calibration: Calls that the chain is fitted to.
        held: Calls that drift is seen on, for the proxies.
        scores: Calls for the bounds, in an order that was drawn.
        shifted: Name -> calls of another kind.
        teaching: Calls of yet other data, that teach what outputs say of drift; none: half of the
            scores do.
        gains: How many calibration calls the proxies see.
        dense: Layers that stay dense in a second count of the proxies.
    """

    name: str
    model: Any
    calibration: Sequence[Any]
    held: Sequence[Any]
    scores: Sequence[Any]
    shifted: Mapping[str, Sequence[Any]]
    gains: int
    dense: tuple[str, ...] = ()
    teaching: Sequence[Any] = ()


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(CASES), default="minilm")
    parser.add_argument("--held", type=int, default=64, help="held out, for the proxies' drift")
    parser.add_argument("--scores", type=int, default=1200, help="held out, for the bounds")
    parser.add_argument("--seconds", type=float, default=900.0, help="for Jacobian norms")
    parser.add_argument("--only", choices=("proxies", "bounds"), help="the other part stays")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    name = (
        "certificates.json" if options.model == "minilm" else f"certificates_{options.model}.json"
    )
    out: Path = HERE / name if options.out is None else options.out
    parts = ("proxies", "bounds") if options.only is None else (options.only,)
    run(options.model, options.held, options.scores, options.seconds, out, parts)


def minilm(held: int, scores: int) -> Case:
    """The sentence encoder on docstrings, a text each call."""
    import torch

    from examples import demo_minilm, docstrings, models

    model, _ = models.minilm()
    tokens = demo_minilm._tokenizer()
    texts = [text for pair in docstrings.halves() for text in pair]
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    calls = [tokens(texts[i]) for i in chosen[: CALIBRATION + held + scores]]
    rest = calls[CALIBRATION:]
    return Case(
        "all-MiniLM-L6-v2, 128 tokens, all outputs",
        model,
        calls[:CALIBRATION],
        rest[:held],
        rest[held:],
        {"other packages": [tokens(t) for t in other_texts(400)]},
        3,
    )


def glyphs(held: int, scores: int) -> Case:
    """The residual network that reads characters, a batch of images each call."""
    import torch
    from torch.nn import functional

    from examples import glyphs as example

    model, data = example.network()
    draw = torch.Generator().manual_seed(0)

    def calls(part: Any, count: int) -> list[Any]:
        order = torch.randperm(len(part[1]), generator=draw)[: count // BATCH * BATCH]
        return [(part[0][index].contiguous(),) for index in order.split(BATCH)]

    bounded = calls(data.test, scores)
    noisy = [(x + 0.15 * torch.randn(x.shape, generator=draw),) for (x,) in bounded]
    turned = torch.tensor([[1.0, 0.35, 0.0], [0.0, 1.0, 0.0]]).expand(BATCH, 2, 3)
    grid = functional.affine_grid(turned, [BATCH, 1, example.SIZE, example.SIZE], False)
    slanted = [(functional.grid_sample(x, grid, align_corners=False),) for (x,) in bounded]
    fonts = calls(data.validation, scores)
    return Case(
        "glyph ResNet, 62 classes, logits",
        model,
        calls(data.train, GLYPHS),
        fonts[: held // BATCH],
        bounded,
        {"noise": noisy, "slanted": slanted, "validation fonts": fonts},
        3,
        ("head",),
        calls(data.train, len(data.train[1])),
    )


CASES = {"minilm": minilm, "glyphs": glyphs}


def run(kind: str, held: int, scores: int, seconds: float, out: Path, parts: Sequence[str]) -> None:
    """Lower the model, estimate and observe, bound and test."""
    import torch

    from benchmarks.machine import describe

    torch.set_num_threads(1)
    case = CASES[kind](held, scores)
    command = f"python -m benchmarks.certificates --model {kind} --held {held} --scores {scores}"
    if len(parts) == 1:
        command += f" --only {parts[0]}"
    result: dict[str, Any] = json.loads(out.read_text()) if len(parts) == 1 else {}
    made = {"proxies": estimates, "bounds": compiled}
    for part in parts:
        result[part] = {"command": command, "machine": describe()} | made[part](case, seconds)
    result = {"model": case.name} | {part: result[part] for part in made}
    out.write_text(json.dumps(result, indent=1) + "\n")


def estimates(case: Case, seconds: float) -> dict[str, Any]:
    """Proxies of chains for every objective and of other plans, in torch."""
    import t3c
    from t3c.controller.plan import plan
    from t3c.core.objective import Objective
    from t3c.targets import detect_host

    elastic = t3c.elasticize(case.model, case.calibration[0])
    flat = [elastic.captured.flatten(call, {}) for call in case.calibration]
    unseen = [elastic.captured.flatten(call, {}) for call in case.held]
    rows: list[dict[str, Any]] = []
    gains = None
    for objective in Objective:  # latency first
        found = plan(
            elastic, flat, detect_host(), profiles=CHAIN, seconds=60.0, objective=objective
        )
        plans = {f"{objective} {p.name}": (dict(p.formats), "chain") for p in found.chain}
        if objective is Objective.LATENCY:
            plans |= stress(found.table.entries, case, len(plans))
        seen = measured(elastic, found, plans, flat, unseen, seconds, case, gains)
        gains = seen["gains"]
        rows += seen["rows"]
        print(f"{objective}: {len(plans)} plans", flush=True)
    result = {
        "held_out": len(unseen),
        "inputs_of_proxies": case.gains,
        "gains_seconds": gains.seconds,
        "sites": len(elastic.sites),
        "sites_measured": len(gains.measured),
        "seconds_per_plan": sorted(row["seconds"] for row in rows)[len(rows) // 2],
        "groups": groups(rows, case),
        "rows": [{k: v for k, v in row.items() if k not in ("formats", "seconds")} for row in rows],
    }
    show(result)
    return result


def compiled(case: Case, _: float) -> dict[str, Any]:
    """Bounds of the library that `lower` makes."""
    import t3c

    with tempfile.TemporaryDirectory() as folder:
        artifact = t3c.lower(
            case.model,
            "x86",
            case.calibration[0],
            Path(folder) / "net",
            calibration=case.calibration,
            calls=0,
            say=lambda line: None,
        )
        result = bounds(t3c.load(artifact), case)
    for row in result["profiles"]:
        print(json.dumps(row))
    return result


def stress(entries: Any, case: Case, count: int) -> dict[str, tuple[dict[str, Any], str]]:
    """Plans that no chain holds: every layer at the same depth of its menu, or drawn at random.

    Args:
        entries: Site -> format -> damage.
        case: Its `dense` layers stay dense in a copy of every plan.
        count: Plans of the chain beside them.

    Returns:
        Name -> (formats, kind).
    """
    import torch

    from t3c.core.formats import Dense

    menu = {site: list(row) for site, row in entries.items()}
    plans: dict[str, tuple[dict[str, Any], str]] = {}
    for i in range(UNIFORM):
        share = i / (UNIFORM - 1)
        formats = {s: r[round(share * (len(r) - 1))] for s, r in menu.items()}
        plans[f"uniform {i}"] = formats, "stress"
    draw = torch.Generator().manual_seed(1)
    mixed = max(MIXED, PLANS - UNIFORM - count)
    for i in range(mixed):
        keep = 1 - (i + 1) / (mixed + 1)  # share of layers left dense
        plans[f"mixed {i}"] = {
            s: Dense(8) if float(torch.rand(1, generator=draw)) < keep or len(r) < 2
            else r[1 + int(torch.randint(len(r) - 1, (1,), generator=draw))]
            for s, r in menu.items()
        }, "stress"  # fmt: skip
    for name, (formats, _) in list(plans.items()) if case.dense else ():
        copy = formats | dict.fromkeys(case.dense, Dense(8))
        if copy != formats:
            plans[f"{name}, {', '.join(case.dense)} dense"] = copy, "copy"
    return plans


def measured(
    elastic: Any,
    found: Any,
    plans: Mapping[str, tuple[dict[str, Any], str]],
    flat: Sequence[Any],
    unseen: Sequence[Any],
    seconds: float,
    case: Case,
    known: Any,
) -> dict[str, Any]:
    """Every proxy and the observed drift of plans from one search, and the gains behind them."""
    from t3c.certificate.observed import observed
    from t3c.certificate.proxy import Meter
    from t3c.controller.statistics import correct

    damage = {s: {f: e.damage for f, e in row.items()} for s, row in found.table.entries.items()}
    correct(elastic, [formats for formats, _ in plans.values()], flat)
    meter = Meter(elastic, flat[: case.gains], seconds=seconds, damage=damage, known=known)
    rows = []
    for name, (formats, kind) in plans.items():
        start = time.monotonic()
        against = meter.against(formats)
        took = time.monotonic() - start
        drift = observed(elastic, formats, unseen)
        totals = {variant: total for variant, (total, _) in against.totals.items()}
        row = {"plan": name, "kind": kind, "formats": formats, "seconds": took}
        rows.append(row | {"observed": drift.mean, "p95": drift.p95} | totals)
    return {"rows": rows, "gains": meter.gains}


def groups(rows: Sequence[Mapping[str, Any]], case: Case) -> dict[str, Any]:
    """Correlations within each group of plans; equal plans count once."""
    from t3c.core.formats import Dense
    from t3c.core.objective import Objective

    chain = [row for row in rows if row["kind"] == "chain"]
    first = [row for row in chain if row["plan"].startswith("latency")]
    other = [row for row in rows if row["kind"] == "stress"]
    made = {
        "shipped": ("profiles of the chains for every objective", chain),
        **{
            f"{objective} chain": (f"profiles of the chain for {objective} alone", some)
            for objective in Objective
            for some in [[row for row in chain if row["plan"].startswith(objective)]]
        },
        "stress": ("the latency chain, uniform and random plans", first + other),
        "random": ("uniform and random plans alone", other),
    }
    if case.dense:
        dense = [r for r in rows if all(r["formats"][s] == Dense(8) for s in case.dense)]
        some = [r for r in dense if r in first or r["kind"] != "chain"]
        made["stress, head dense"] = (f"the stress with {', '.join(case.dense)} dense", some)
    found = {}
    for name, (what, some) in made.items():
        distinct = list({frozenset(r["formats"].items()): r for r in some}.values())
        seen = [row["observed"] for row in distinct]
        found[name] = {
            "what": what,
            "plans": len(distinct),
            "variants": {v: agreement([r[v] for r in distinct], seen) for v in VARIANTS},
        }
    return found


def agreement(estimate: Sequence[float], seen: Sequence[float]) -> dict[str, Any]:
    """Pearson with its 95 % interval, of the values and of their logarithms; ratios."""
    import numpy as np

    x, y = np.array(estimate), np.array(seen)
    ratios = x / y
    r = float(np.corrcoef(x, y)[0, 1])
    z, half = math.atanh(r), 1.96 / math.sqrt(len(x) - 3)
    return {
        "pearson": r,
        "interval": [math.tanh(z - half), math.tanh(z + half)],
        "pearson_log": float(np.corrcoef(np.log(x), np.log(y))[0, 1]),
        "covers": float((ratios >= 1).mean()),
        "median_ratio": float(np.median(ratios)),
    }


def bounds(session: Any, case: Case) -> dict[str, Any]:
    """Coverage of split-conformal bounds, on the same domain and on others."""
    import numpy as np

    from t3c.certificate.calibrated import conformal_bound
    from t3c.certificate.library import library_scores
    from t3c.certificate.scaled import per_input

    whole = library_scores(session, case.model, case.scores)
    scores = whole.original
    others = {n: library_scores(session, case.model, c) for n, c in case.shifted.items()}
    taught = library_scores(session, case.model, case.teaching) if case.teaching else None
    shifted = {n: other.original for n, other in others.items()}
    random = np.random.default_rng(0)
    rows = []
    for name, drift in scores.items():
        half = len(drift) // 2
        cover: dict[float, list[float]] = {level: [] for level in LEVELS}
        ratios = []
        for _ in range(SPLITS):
            order = random.permutation(len(drift))
            fit, test = drift[order[:half]], drift[order[half:]]
            for level in LEVELS:
                bound = conformal_bound(fit, level)
                cover[level].append(float((test <= bound).mean()))
                if level == LEVELS[0]:
                    ratios.append(bound / float(np.median(test)))
        learned = taught and per_input(
            whole.features[name],
            drift,
            LEVELS,
            scores=whole.classes is not None,
            taught=(taught.features[name], taught.original[name]),
        )
        rows.append(
            {
                "profile": name,
                "coverage": {str(v): float(np.mean(cover[v])) for v in LEVELS},
                "inside_binomial": {str(v): _inside(cover[v], v, half, half) for v in LEVELS},
                "median_bound_over_observed": float(np.median(ratios)),
                "shifted_coverage": {
                    kind: {
                        str(v): float((other[name] <= conformal_bound(drift, v)).mean())
                        for v in LEVELS
                    }
                    for kind, other in shifted.items()
                },
                "per_input": single(whole, others, name, random),
                "per_input_taught": learned and single(whole, others, name, random, learned),
                "per_input_taught_on": learned
                and {kind: single(o, {}, name, random, learned) for kind, o in others.items()},
            }
        )
    first = next(iter(scores))
    return {
        "inputs": len(scores[first]),
        "teaching_inputs": len(taught.digests) if taught else 0,
        "shifted_inputs": {kind: len(other[first]) for kind, other in shifted.items()},
        "splits": SPLITS,
        "profiles": rows,
    }


def single(
    whole: Any, others: Mapping[str, Any], name: str, random: Any, learned: Any = None
) -> dict[str, Any]:
    """The same of bounds for each input: coverage, bound over drift, other data.

    Args:
        whole: Inputs, half of which give the bound, and half test it.
        others: Kind -> inputs of another kind, that test the bound from all of `whole`.
        name: The profile.
        random: Draws the halves.
        learned: Bounds whose weights other inputs taught; None: half of the half that gives the
            bound teaches.
    """
    import numpy as np

    from t3c.certificate.calibrated import conformal_bound
    from t3c.certificate.scaled import per_input
    from t3c.core.per_input import widened

    seen, drift = whole.features[name], whole.original[name]
    scores = whole.classes is not None
    made = per_input(seen, drift, LEVELS, scores=scores) if learned is None else learned
    wide = widened(seen, made.directions) if scores else seen
    predicted = made.predicted(wide)
    half = len(drift) // 2
    cover: dict[float, list[float]] = {level: [] for level in LEVELS}
    ratios = []
    for _ in range(SINGLE_SPLITS):
        order = random.permutation(len(drift))
        fit, test = order[:half], order[half:]
        if learned is None:
            one = per_input(seen[fit], drift[fit], LEVELS, scores=scores)
            factors, expected = one.factors, one.predicted(wide[test])
        else:  # the same weights, whichever inputs give the factors
            factors = [conformal_bound(drift[fit] / predicted[fit], level) for level in LEVELS]
            expected = predicted[test]
        for level, factor in zip(LEVELS, factors, strict=True):
            cover[level].append(float((drift[test] <= factor * expected).mean()))
        ratios.append(float(np.median(factors[0] * expected / drift[test])))

    def covered(other: Any) -> dict[str, float]:
        x = other.features[name]
        expected = made.predicted(widened(x, made.directions) if scores else x)
        return {
            str(v): float((other.original[name] <= f * expected).mean())
            for v, f in zip(LEVELS, made.factors, strict=True)
        }

    return {
        "splits": SINGLE_SPLITS,
        "coverage": {str(v): float(np.mean(cover[v])) for v in LEVELS},
        "inside_binomial": {
            str(v): _inside(cover[v], v, half, half if learned else half // 2) for v in LEVELS
        },
        "median_bound_over_observed": float(np.median(ratios)),
        "shifted_coverage": {kind: covered(other) for kind, other in others.items()},
    }


def _inside(shares: Sequence[float], level: float, tested: int, fitted: int) -> float:
    """Share of splits whose coverage lies in the 95 % interval of both samples' chance.

    The bound is random, too: coverage of one split is beta-binomial; its variance is
    level (1 - level) (1 / tested + 1 / fitted).
    """
    deviation = math.sqrt(level * (1 - level) * (1 / tested + 1 / fitted))
    return sum(abs(s - level) <= 1.96 * deviation + 1 / tested for s in shares) / len(shares)


def other_texts(limit: int) -> list[str]:
    """Docstrings of other packages."""
    import importlib
    import inspect

    found: dict[str, None] = {}
    for name in OTHERS:
        module = importlib.import_module(name)
        for attribute in sorted(vars(module)):
            doc = inspect.getdoc(vars(module)[attribute])
            if isinstance(doc, str) and len(doc.split()) >= 24:
                found.setdefault(" ".join(doc.split()[:200]))
    texts = list(found)
    return [texts[i * len(texts) // limit] for i in range(min(limit, len(texts)))]


def show(found: Mapping[str, Any]) -> None:
    """A line for every variant of every group."""
    measured = f"{found['sites_measured']} of {found['sites']} Jacobians"
    print(f"{found['held_out']} held-out calls, {measured}")
    for name, group in found["groups"].items():
        print(f"{name}: {group['plans']} plans ({group['what']})")
        _lines(group["variants"])


def _lines(variants: Mapping[str, Any]) -> None:
    for name, row in variants.items():
        low, high = row["interval"]
        print(
            f"{name:18} Pearson {row['pearson']:.3f} [{low:.3f}, {high:.3f}]  "
            f"log {row['pearson_log']:.3f}  covers {row['covers']:.2f}  "
            f"median ratio {row['median_ratio']:.3g}"
        )


if __name__ == "__main__":
    main()
