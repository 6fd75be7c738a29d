"""What a site may become on a target: the menu, and the gate that keeps slower formats off it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from t3c.controller.costs import dense_costs, site_costs
from t3c.core.code_storage import CodeStorage
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.gate import GateRow
from t3c.core.objective import Goal, Objective
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.cost_models.base import AbstractCostModel, Row

SHARES = (0.75, 0.5, 0.35, 0.25, 0.125)
"""Shares of full rank on the coarse menu."""
COUNTED = (0.75, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.19, 0.125)
"""The same where costs are counted, not timed: they fall with every component, kernels' times in
steps. Source: MiniLM at 57 % of the multiply-adds drifts .393 instead of .409 with twice the ranks.
"""
FOUR_BITS = 0.8
"""A linear layer takes 4 bits for its smaller formats where dense int4 is predicted to cost at most
this share of dense int8: in time, where weights are waited for."""


def ranks(full: int, step: int, shares: Sequence[float] | None) -> list[int]:
    """Multiples of `step` below full rank, largest first.

    Args:
        full: Full rank.
        step: The target's rank step.
        shares: Nearest multiples of these shares of full rank; None: every multiple.
    """
    wanted: Sequence[int] = range(step, full, step)
    if shares is not None:
        wanted = [max(step, round(share * full / step) * step) for share in shares]
    return sorted({rank for rank in wanted if rank < full}, reverse=True)


def formats(
    site: Site,
    step: int,
    shares: Sequence[float] | None = SHARES,
    *,
    cp: int = 0,
    four: bool = False,
) -> list[Format]:
    """Formats of a site from dense down, each at most the one before in every rank.

    A k x k convolution has one path: both ranks fall together, each as a share of its own side.

    Args:
        site: The site.
        step: The target's rank step.
        shares: Shares of full rank; None: every step.
        cp: Above 0 a k x k convolution becomes CP of less than this rank instead of Tucker-2.
        four: Whether a linear layer below dense int8 has 4-bit weights.
    """
    menu: list[Format] = [Dense(8)]
    match site:
        case LinearSite() if four:
            menu += [Dense(4), *(LowRank(r, 4) for r in ranks(site.full_rank, step, shares))]
        case LinearSite():
            menu += [LowRank(rank) for rank in ranks(site.full_rank, step, shares)]
        case ConvSite() if site.pointwise:
            menu += [LowRank(rank) for rank in ranks(site.full_rank, step, shares)]
        case ConvSite() if cp > 0:
            menu += [CP(rank) for rank in ranks(cp, step, shares)]
        case ConvSite():
            menu += _tucker(site, step, shares)
    return menu


def gate(
    sites: Mapping[str, Site],
    step: int,
    model: AbstractCostModel,
    *,
    threads: int = 1,
    shares: Sequence[float] | None = SHARES,
    cp: Mapping[str, int] | None = None,
    codes: bool = False,
    four: bool = False,
    objective: Goal = Objective.LATENCY,
    stored: CodeStorage = CodeStorage.NESTED,
    keep: Collection[str] = (),
) -> tuple[GateRow, ...]:
    """Every format of every site with its time and cost; kept where it costs less than dense.

    Dense formats are always kept and come first at each site.

    Args:
        sites: Site name -> site.
        step: The target's rank step.
        model: Predicts times.
        threads: Threads of one call.
        shares: Shares of full rank; None: every step.
        cp: Site name -> largest CP rank, for convolutions that become CP; None: none do.
        codes: Whether int8 codes flow between convolutions.
        four: Whether the target has kernels of 4-bit weights.
        objective: What a format costs.
        stored: How dense codes of 8 and of 4 bits are stored.
        keep: Sites that stay dense, in 8 bits.
    """
    rows: list[GateRow] = []
    eight = [Row(site, Dense(8), threads, codes) for site in sites.values()]
    known = model.predict(eight), model.predict_energy(eight)
    whole = dense_costs(objective, list(sites.values()), *known)
    for name, site in sites.items():
        prices = partial(site_costs, objective, site, codes=stored, whole=whole)
        parts = [partial(site_costs, part, site, codes=stored) for part in objective.parts]
        thin = four and isinstance(site, LinearSite) and _halves(site, model, threads, parts)
        menu = formats(site, step, shares, cp=(cp or {}).get(name, 0), four=thin)
        menu = menu[:1] if name in keep else menu
        asked = [Row(site, fmt, threads, codes) for fmt in menu]
        times = model.predict(asked)
        joules = model.predict_energy(asked)
        costs = prices(menu, times, joules=joules)
        dense = [i for i, fmt in enumerate(menu) if isinstance(fmt, Dense)]
        if len(parts) > 1:
            costs = _unmixed(costs, [part(menu, times, joules=joules) for part in parts], dense)
        quick, cheap = min(times[i] for i in dense), min(costs[i] for i in dense)
        rows += [
            GateRow(name, fmt, seconds, quick, cost, cheap, objective=objective)
            for fmt, seconds, cost in zip(menu, times, costs, strict=True)
        ]
    return tuple(rows)


Prices = Callable[..., list[float]]
"""(formats, seconds, joules=) -> cost of each."""


def _halves(site: Site, model: AbstractCostModel, threads: int, parts: Sequence[Prices]) -> bool:
    """Whether 4-bit weights save much: all of their bytes, or the time of waiting for them.

    In a mix it is enough that they save much of one part, if no other rises.
    """
    both = [Dense(8), Dense(4)]
    asked = [Row(site, fmt, threads) for fmt in both]
    seconds, joules = model.predict(asked), model.predict_energy(asked)
    each = [part(both, seconds, joules=joules) for part in parts]
    return all(b <= a for a, b in each) and any(b <= FOUR_BITS * a for a, b in each)


def _unmixed(costs: list[float], parts: Sequence[list[float]], dense: Sequence[int]) -> list[float]:
    """Costs of a mix that are no bargain where one of its parts is above dense.

    Each part shall fall along a chain: a profile whose time rises would raise the recorded times of
    all larger ones.

    Args:
        costs: Of each format.
        parts: The same for each part alone.
        dense: Places of the dense formats.
    """
    cheap = min(costs[i] for i in dense)
    return [
        max(cost, cheap) if any(p[i] > min(p[j] for j in dense) for p in parts) else cost
        for i, cost in enumerate(costs)
    ]


def _tucker(site: ConvSite, step: int, shares: Sequence[float] | None) -> list[Format]:
    """Tucker-2 formats with both ranks falling together; none where a side is below the step."""
    sides = (site.in_channels, site.out_channels)
    if min(sides) < step:
        return []
    if shares is None:
        count = max(sides) // step
        shares = [i / count for i in range(count, 0, -1)]

    def rank(full: int, share: float) -> int:
        return min(full // step, max(1, round(share * full / step))) * step

    pairs = {(rank(sides[0], share), rank(sides[1], share)) for share in shares} - {sides}
    return [Tucker2(*pair) for pair in sorted(pairs, reverse=True)]
