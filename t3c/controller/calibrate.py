"""One look at calibration data: second moments at every site, then factors that fit the data."""

import time
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from t3c.controller.compensate import Pair, walk
from t3c.controller.gradients import Seen, look
from t3c.controller.progress import Progress, silent
from t3c.controller.suffix import rows_of, site_calls
from t3c.core.code_storage import CodeStorage
from t3c.core.codes import Grouped, Matrix, Nested
from t3c.core.errors import T3CError
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.registry import resolve
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.elastic.conv import ElasticConv
from t3c.elastic.factorize import FACTORIZATIONS
from t3c.elastic.factorize.base import AbstractFactorizer, Factors, Ranks
from t3c.elastic.factorize.saes_svd import SAES_SVD, SaesSvd
from t3c.elastic.factorize.svd import SVD
from t3c.elastic.layer import ElasticLayer
from t3c.elastic.model import ElasticModel
from t3c.elastic.rounding import round_groups, round_nested, round_rows

Batch = tuple[Tensor, ...]
SIDE_MAX = 4096
"""Inputs of the widest site whose second moment is kept; wider ones keep the plain factors."""
REFERENCES = (0.75, 0.5, 0.25)
"""Shares of the multiply-adds of the copies behind which `saes-svd` fits its factors, all alike:
its ranks serve many profiles. Source: benchmarks/factorizers.py."""

MADE_UP = 0.25
"""How much a dense 4-bit layer makes up for 4-bit layers before it, as a share of what were best
if all were of 4 bits. MiniLM, nested codes, drift of chains for bytes at 8.6, 7.35 and 5.72
MB (4 bits everywhere): nothing .0929, .1156 and .1780, a quarter .0929, .1141 and .1494."""
OUTPUT_DAMPING = 0.03
"""Added to the diagonal of the gradients' second moment, as a share of its mean.

Source: the damping sweep behind the default of two-sided factors.
"""


@dataclass(frozen=True, slots=True)
class Moment:
    """Second moments at one site.

    Attributes:
        total: Sum of x x^T over rows x of the input (pixels for a convolution), [in, in] float32;
            rows of linear layers that no output depends on (padding) do not count.
        gains: Sum of g g^T over rows g of the gradient at the output, [out, out] float32, of a
            random projection of the model's outputs: which output directions matter. None where
            no gradient arrives, or the site is too wide.
        rows: How many rows counted.
        outputs: E[y y^T] of the outputs without bias, [out, out] float32, for windows above 1x1
            only; None elsewhere, where it follows from `total`.
    """

    total: Tensor
    gains: Tensor | None
    rows: int
    outputs: Tensor | None = None

    def __add__(self, other: "Moment") -> "Moment":
        """The moments of both sets of rows."""
        known = self.gains is not None and other.gains is not None
        gains = self.gains + other.gains if known else None  # type: ignore[operator]
        rows, outputs = self.rows + other.rows, None
        if self.outputs is not None and other.outputs is not None:
            share = self.rows / max(rows, 1)
            outputs = share * self.outputs + (1 - share) * other.outputs
        return Moment(self.total + other.total, gains, rows, outputs)

    def mean(self) -> Tensor:
        """E[x x^T], shrunk towards its mean diagonal where there are few rows for its width.

        The weight of the diagonal is width / (rows + width) / 20: 4 % of it after one image of 197
        patches in 768 dimensions, nothing after many.
        """
        width = len(self.total)
        mean = self.total / max(self.rows, 1)
        mean.diagonal().add_(0.05 * width / (self.rows + width) * float(mean.diagonal().mean()))
        return mean

    def directions(self) -> Tensor | None:
        """The damped, normalized gains [out, out]; None without gains."""
        if self.gains is None:
            return None
        level = float(self.gains.diagonal().mean())
        if not 0.0 < level < float("inf"):
            return None
        normal = self.gains / level
        normal.diagonal().add_(OUTPUT_DAMPING)
        return normal


def calibrate(
    elastic: ElasticModel,
    batches: Sequence[Batch],
    *,
    seconds: float | None = None,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Replace the plain factors of every site by factors that lose least on the data.

    Args:
        elastic: The model; its factors change, its dense weights do not.
        batches: Flat inputs, as the graph takes them; one batch is enough, more is better.
        seconds: Stop taking batches after this long (at least one is taken); None: all.
        progress: Told after every batch and every site.

    Returns:
        Sites that keep the plain factors, because their inputs are wider than `SIDE_MAX`.

    Raises:
        T3CError: No batches, or values that are not finite.
    """
    moments = collect(elastic, batches, seconds=seconds, progress=progress)
    return factorize(elastic, moments, progress, batches=batches)


def factorize(
    elastic: ElasticModel,
    moments: Mapping[str, Moment],
    progress: Progress = silent,
    *,
    most: Mapping[str, Ranks] | None = None,
    batches: Sequence[Batch] = (),
    references: Sequence[Mapping[str, Format]] | None = None,
) -> tuple[str, ...]:
    """Replace the factors of sites, in the metric of the data where a site has a moment.

    Sites whose factorizer makes up for the errors of earlier sites are then done once more, front
    to back, behind copies of the network whose ranks are `REFERENCES` (see `compensate`).

    Args:
        elastic: The model.
        moments: Site name -> moment.
        progress: Told after every site.
        most: Site name -> the largest ranks needed; sites left out keep what they have. None: all
            sites that have a moment, at full rank.
        batches: Flat inputs behind the moments; only factorizers that compensate need them.
        references: Site name -> format of the copies that those run behind, ranks in float; None:
            `reference` at each of `REFERENCES`.

    Returns:
        Sites whose factors ignore the data.

    Raises:
        ValueError: A factorizer needs the batches and there are none.
    """
    names = list(moments) if most is None else list(most)

    def factors(name: str) -> Factors:
        ranks = None if most is None else most[name]
        return split(elastic.layers[name], moments.get(name), ranks)

    # A site per thread: eigenproblems this small gain nothing from more, and wait for each other
    # where other processes keep a core busy.
    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        for done, (name, made) in enumerate(zip(names, pool.map(factors, names), strict=True)):
            progress("factorizing", done, len(names))
            elastic.set_factors(name, made)
    progress("factorizing", len(names), len(names))
    if aimed := [n for n in names if n in moments and _aims(elastic.layers[n]) is not None]:
        if references is None:
            references = [reference(elastic, share, most) for share in REFERENCES]
        _compensate(elastic, moments, aimed, most, batches, references, progress)
    return tuple(n for n in (elastic.sites if most is None else most) if n not in moments)


def _aims(layer: ElasticLayer) -> SaesSvd | None:
    """The layer's factorizer, if it makes up for errors of earlier layers."""
    kind = kind_of(layer)
    found = factorizer_of(layer, kind)
    return found if kind is LowRank and isinstance(found, SaesSvd) else None


def _compensate(
    elastic: ElasticModel,
    moments: Mapping[str, Moment],
    names: Sequence[str],
    most: Mapping[str, Ranks] | None,
    batches: Sequence[Batch],
    references: Sequence[Mapping[str, Format]],
    progress: Progress,
) -> None:
    """Make the factors of these sites again, of weights that fit compressed inputs.

    Sites that are called more than once keep what they have: each call has errors of its own.
    """
    if not batches:
        raise ValueError(
            f"{SAES_SVD.name!r} runs the network front to back; give factorize() the batches that "
            "the moments come from"
        )

    def renew(name: str, pair: Pair) -> None:
        layer, factorizer = elastic.layers[name], _aims(elastic.layers[name])
        if factorizer is None or torch.equal(pair.total, pair.cross):
            return  # nothing before this site errs
        seen = Moment(pair.total, moments[name].gains, pair.rows)
        mean = seen.mean()
        cross = mean + (pair.cross - pair.total) / pair.rows  # shrunk like the mean
        aim = factorizer.aimed(layer.weight, mean, cross)
        ranks = None if most is None else most[name]
        elastic.set_factors(name, factorizer.split(aim, mean, gains=seen.directions(), ranks=ranks))

    sites = _once(elastic, names)
    walk(elastic, batches, references, sites, renew, progress, kept=_kept(elastic, batches, sites))


def _kept(
    elastic: ElasticModel, batches: Sequence[Batch], sites: Sequence[str]
) -> list[dict[str, Tensor]]:
    """For each batch, site -> the rows that `collect` counts, bool [rows]."""
    found: list[dict[str, Tensor]] = []
    for number, batch in enumerate(batches):
        found.append({})
        for seen in look(elastic, batch, sites, [number]):
            found[-1][seen.site] = _counted(elastic.sites[seen.site], seen)
    return found


def reference(
    elastic: ElasticModel, share: float, most: Mapping[str, Ranks] | None = None
) -> dict[str, Format]:
    """Low ranks, in float, with this share of each site's dense multiply-adds; the rest dense.

    Args:
        elastic: The model.
        share: Of the multiply-adds of each site.
        most: Site name -> largest ranks; other sites stay dense. None: no limit, all sites.
    """
    found: dict[str, Format] = {}
    for name, layer in elastic.layers.items():
        if kind_of(layer) is not LowRank or (most is not None and name not in most):
            continue
        n, k = layer.weight.shape[:2]
        rank = max(1, int(share * SVD.break_even((n, k))))
        found[name] = LowRank(rank if most is None else min(rank, most[name][0]), 32)
    return found


def round_weights(
    elastic: ElasticModel,
    moments: Mapping[str, Moment],
    menu: Mapping[str, Sequence[Format]],
    progress: Progress = silent,
    *,
    batches: Sequence[Batch] = (),
    share: float = MADE_UP,
    stored: CodeStorage = CodeStorage.NESTED,
) -> None:
    """Choose codes with error feedback for everything that linear layers may run on.

    Dense weights that may have 8 or 4 bits get nested codes, which are stored once, or each width
    is rounded as if there were no other. Given batches, 4-bit codes of dense weights are then
    chosen once more, front to back, to make up in part for the 4-bit codes before them; those of 8
    bits still stand for the weight itself.
    Source: Arai and Ichikawa, "Quantization Error Propagation", 2025 (arXiv 2504.09629).

    Args:
        elastic: The model, with its factors.
        moments: Site name -> moment; other sites keep plain rounding.
        menu: Site name -> formats.
        progress: Told after every site.
        batches: Flat inputs behind the moments; none: nothing is chosen again.
        share: How much of those errors 4-bit codes make up for, 0 to 1.
        stored: How dense codes of 8 and of 4 bits are stored, where the menu has both.
    """
    names = [n for n in menu if n in moments and isinstance(elastic.sites[n], LinearSite)]

    def codes(name: str) -> list[tuple[str, Matrix | Grouped | Nested]]:
        layer, moment = elastic.layers[name], moments[name].mean()
        wanted = {("low" if isinstance(f, LowRank) else "weight", f.bits) for f in menu[name]}
        made: list[tuple[str, Matrix | Grouped | Nested]] = []
        if _nests(menu[name], stored):
            made.append(("weight", round_nested(layer.weight, moment)))
            wanted -= {("weight", 8), ("weight", 4)}
        for factor, bits in sorted(wanted):
            value = layer.weight if factor == "weight" else layer.factor(factor)
            if bits == 4:
                made.append((factor, round_groups(value, moment, search=True)))
            elif bits == 8:
                made.append((factor, round_rows(value, moment)))
        return made

    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        for done, (name, made) in enumerate(zip(names, pool.map(codes, names), strict=True)):
            progress("rounding weights", done, len(names))
            for factor, value in made:
                if isinstance(value, Nested):
                    elastic.layers[name].set_nested(value)
                else:
                    elastic.layers[name].set_codes(factor, value)
    progress("rounding weights", len(names), len(names))
    if batches and (four := [n for n in names if Dense(4) in menu[n]]):
        nested = {n for n in four if _nests(menu[n], stored)}
        _round_again(elastic, moments, nested, four, batches, share, progress)


def _nests(menu: Sequence[Format], stored: CodeStorage) -> bool:
    """Whether one array holds the dense codes of both widths."""
    return stored is CodeStorage.NESTED and {Dense(8), Dense(4)} <= set(menu)


def _round_again(
    elastic: ElasticModel,
    moments: Mapping[str, Moment],
    nested: Collection[str],
    names: Sequence[str],
    batches: Sequence[Batch],
    share: float,
    progress: Progress,
) -> None:
    """4-bit codes of weights that fit inputs behind 4-bit layers."""
    factorizer = replace(SAES_SVD, share=share)

    def renew(name: str, pair: Pair) -> None:
        if torch.equal(pair.total, pair.cross):
            return
        layer, moment = elastic.layers[name], moments[name].mean()
        mean = Moment(pair.total, None, pair.rows).mean()
        aim = factorizer.aimed(layer.weight, mean, mean + (pair.cross - pair.total) / pair.rows)
        if name in nested:
            layer.set_nested(round_nested(layer.weight, moment, aim))
        else:
            layer.set_codes("weight", round_groups(aim, moment, search=True))

    sites = _once(elastic, names)
    references = [dict.fromkeys(names, Dense(4))]
    kept = _kept(elastic, batches, sites)
    walk(elastic, batches, references, sites, renew, progress, kept=kept, exact=True)


def _once(elastic: ElasticModel, names: Sequence[str]) -> list[str]:
    """Sites that are called once: several calls would have errors of their own each."""
    calls = site_calls(elastic)
    return [name for name in names if len(calls[name]) == 1]


@contextmanager
def one_thread_each() -> Generator[int]:
    """Let every torch operator run on one thread; gives the threads that there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def collect(
    elastic: ElasticModel,
    batches: Sequence[Batch],
    *,
    sites: Collection[str] | None = None,
    seconds: float | None = None,
    progress: Progress = silent,
) -> dict[str, Moment]:
    """Second moments of sites of the original model; sites wider than `SIDE_MAX` are left out.

    Args:
        elastic: The model.
        batches: Flat inputs, as the graph takes them.
        sites: Names of the sites; None: all.
        seconds: Stop taking batches after this long (at least one is taken); None: all.
        progress: Told after every batch.

    Raises:
        T3CError: No batches, or values that are not finite.
    """
    if not batches:
        raise T3CError("calibration needs at least one batch of inputs; got none")
    deadline = None if seconds is None else time.monotonic() + seconds
    wanted = [
        name
        for name, site in elastic.sites.items()
        if (sites is None or name in sites) and width(site) <= SIDE_MAX
    ]
    moments: dict[str, Moment] = {}
    for done, batch in enumerate(batches):
        progress("collecting statistics", done, len(batches))
        if done and deadline is not None and time.monotonic() > deadline:
            break
        for seen in look(elastic, batch, wanted, [done]):
            moment = _moment(elastic.layers[seen.site], seen)
            known = moments.get(seen.site)
            moments[seen.site] = moment if known is None else known + moment
    progress("collecting statistics", len(batches), len(batches))
    for name, moment in moments.items():
        if not bool(moment.total.isfinite().all()):
            raise T3CError(
                f"site {name!r} sees inputs that are not finite on the calibration data; "
                "check the batches, then the model"
            )
    return moments


def kind_of(layer: ElasticLayer) -> type[Format]:
    """The factorized format of a layer's profiles."""
    if isinstance(layer, ElasticConv) and not layer.site.pointwise:
        return CP if layer.kxk == "cp" else Tucker2
    return LowRank


def factorizer_of(layer: ElasticLayer, kind: type[Format]) -> AbstractFactorizer:
    """The factorizer of a layer's format kind."""
    found = resolve(FACTORIZATIONS, layer.factorizer(kind), "factorization", T3CError)
    return cast(AbstractFactorizer, found)


def split(layer: ElasticLayer, moment: Moment | None, ranks: Ranks | None = None) -> Factors:
    """Factors of a layer's weight up to `ranks`, in the metric of its data."""
    kind = kind_of(layer)
    factorizer = factorizer_of(layer, kind)
    ranks = layer.fit_ranks(kind) if ranks is None else ranks
    if moment is None:
        return factorizer.split(layer.weight, ranks=ranks)
    return factorizer.split(
        layer.weight,
        moment.mean(),
        gains=moment.directions(),
        outputs=moment.outputs,
        ranks=ranks,
    )


def width(site: Site) -> int:
    """Inputs of a site: features or channels."""
    match site:
        case LinearSite():
            return site.k
        case ConvSite():
            return site.in_channels


def _moment(layer: ElasticLayer, seen: Seen) -> Moment:
    """Moments of one call of a site."""
    site, bias = layer.site, layer.bias
    rows, gains = rows_of(site, seen.x)[_counted(site, seen)], None
    if seen.slopes:
        back = rows_of(site, seen.slopes[0])
        gains = back.T @ back if back.shape[1] <= SIDE_MAX else None
    return Moment(rows.T @ rows, gains, len(rows), _outputs(site, seen.y, bias))


def _outputs(site: Site, y: Tensor, bias: Tensor | None) -> Tensor | None:
    """E[y y^T] of a convolution's outputs without bias; None where windows are 1x1."""
    if isinstance(site, LinearSite) or site.pointwise or site.out_channels > SIDE_MAX:
        return None
    found = rows_of(site, y)
    found = found if bias is None else found - bias.detach()
    return found.T @ found / max(len(found), 1)


def _counted(site: Site, seen: Seen) -> Tensor:
    """Which rows of the input count, bool [rows]: of linear layers those that an output needs."""
    if seen.slopes and isinstance(site, LinearSite):
        return rows_of(site, seen.slopes[0]).abs().amax(1) != 0  # keeps NaN: refused by name
    return torch.ones(len(rows_of(site, seen.x)), dtype=torch.bool)
