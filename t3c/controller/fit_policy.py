"""Training the policy: imitation of exhaustive search, then on what drift really is (torch).

First, on a proxy of time that knows no device (multiply-adds and bytes), the network learns where
on a chain a budget lies; then the device's own costs take its place. Last, it is tuned on measured
drift of inputs: of the continuous choice for half of the budgets, of the snapped one for the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from t3c.core.budget import COSTS
from t3c.core.profile import Percentile, Profile, ProfileChain
from t3c.runtime.policy import LEAST, SUMMARY, UNLIMITED, Array, Layers, Policy, table_of

HIDDEN = 16
BATCH = 256
RATE = 1e-2
COMPUTE_SHARE = 0.5
"""Of multiply-adds in the proxy; the rest is stored bytes."""
PENALTY = 4.0
"""On being over a limit, in units of the distance between smallest and largest profile."""
LEAST_INPUTS = 16
"""A policy that looks at inputs is fitted to so many at least."""
UNLIMITED_SHARE = 0.4
"""Of components in sampled budgets; at least one is limited."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is worth knowing of a trained policy.

    Attributes:
        proxy_rank_correlation: Spearman's, of the proxy and recorded latency; None without one.
        exact_before_snapping: Share of sampled feasible budgets whose rounded position is already
            the exhaustive search's profile.
        snapping_gap: For each profile, mean drift of the snapped choice minus that of the
            continuous one, relative to the drift of the smallest; None where nothing snapped to it.
        objective: For each profile that is the largest feasible one: (policy, chain), mean over
            held-out inputs of what was minimized; empty without summaries.
    """

    proxy_rank_correlation: float | None
    exact_before_snapping: float
    snapping_gap: tuple[float | None, ...]
    objective: tuple[tuple[float, float], ...]

    def remarks(self, chain: ProfileChain) -> list[str]:
        """What a user should know, a line each."""
        lines = [f"the network alone is right for {self.exact_before_snapping:.0%} of budgets"]
        if self.proxy_rank_correlation is not None:
            lines.append(
                "profiles by multiply-adds and bytes and by recorded latency: rank correlation "
                f"{self.proxy_rank_correlation:.3f}"
            )
        names = [p.name for p in chain]
        pairs = zip(names, self.objective, strict=True) if self.objective else ()
        pays = [name for name, (ours, chains) in pairs if ours < chains]
        if self.objective:
            where = f"up to {', '.join(pays)}" if pays else "nowhere: the chain decides, as before"
            lines.append(f"letting inputs choose pays on inputs that it was not fitted to {where}")
        return lines


class _Network(nn.Module):
    """A curve for each component, and one network for the summary."""

    def __init__(self, budgets: int, features: int) -> None:
        super().__init__()
        steep = torch.full((budgets, HIDDEN), 12.0)  # as steep as steps of a dozen profiles need
        knots = torch.linspace(LEAST, UNLIMITED, HIDDEN).expand(budgets, -1)
        self.hidden = nn.Parameter(steep)
        self.bias = nn.Parameter((-12.0 * knots).clone())
        self.out = nn.Parameter(torch.full((budgets, HIDDEN), -3.4))
        self.shift = nn.Parameter(torch.full((budgets,), 0.5))
        self.content = None
        if features:
            self.content = nn.Sequential(
                nn.Linear(features, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)
            )
            last: Any = self.content[2]
            nn.init.constant_(last.bias, 0.5)

    def curves(self, budgets: Tensor) -> Tensor:
        """Places [batch, components]; never fall when a limit rises."""
        rising, out = nn.functional.softplus(self.hidden), nn.functional.softplus(self.out)
        places = torch.tanh(budgets[:, :, None] * rising + self.bias) * out
        return places.sum(2) + self.shift

    def forward(self, budgets: Tensor) -> Tensor:
        """Place on the chain that budgets allow, 0 to 1 and a little beyond [batch]."""
        return self.curves(budgets).min(1).values

    def enough(self, summary: Tensor) -> Tensor:
        """Place on the chain that inputs are content with [batch]."""
        assert self.content is not None
        found: Tensor = self.content(summary)
        return found.squeeze(1)

    def layers(self) -> tuple[tuple[Layers, ...], Layers | None]:
        """As arrays."""
        hidden, out = (nn.functional.softplus(x).detach() for x in (self.hidden, self.out))
        parts = zip(hidden, self.bias.detach(), out, self.shift.tolist(), strict=True)
        curves = tuple(Layers(_array(h[:, None]), _array(b), _array(o), s) for h, b, o, s in parts)
        if self.content is None:
            return curves, None
        first: Any = self.content[0]
        last: Any = self.content[2]
        weight, offset, outer = first.weight.detach(), first.bias.detach(), last.weight[0].detach()
        shift = float(last.bias.item())
        return curves, Layers(_array(weight), _array(offset), _array(outer), shift)


def _array(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def fit(
    chain: ProfileChain,
    drifts: NDArray[Any],
    *,
    summaries: NDArray[Any] | None = None,
    time_price: float = 0.5,
    percentile: Percentile = "p95",
    steps: int = 1500,
    seed: int = 0,
) -> tuple[Policy, Report]:
    """Train a policy for one chain.

    Args:
        chain: Profiles with recorded costs that rise along it.
        drifts: [inputs, profiles], measured drift of each input in each profile.
        summaries: [inputs, SUMMARY], for a policy that looks at inputs; None: budgets alone. Every
            second input is then held out, and decides where inputs may choose.
        time_price: With summaries: what all of the largest profile's time costs, in units of the
            mean drift of the smallest profile.
        percentile: Of recorded latency.
        steps: Of each of the two trainings.
        seed: Of all random numbers.

    Returns:
        The policy, and what is worth knowing of it.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, or falling costs.
    """
    count = len(chain)
    if drifts.ndim != 2 or drifts.shape[1] != count or not np.isfinite(drifts).all():
        raise ValueError(f"drifts are {drifts.shape}; finite [inputs, {count} profiles] are needed")
    if count < 2:
        raise ValueError("a chain of one profile leaves a policy nothing to choose")
    if summaries is not None and len(drifts) < LEAST_INPUTS:
        raise ValueError(
            f"{len(drifts)} inputs; a policy that looks at them is fitted to half of at least "
            f"{LEAST_INPUTS}: give more calls, or leave summaries out"
        )
    if summaries is not None and summaries.shape != (len(drifts), SUMMARY):
        raise ValueError(f"summaries are {summaries.shape}, not {(len(drifts), SUMMARY)}")
    components = tuple(n for n in COSTS if np.isfinite(table_of(chain, (n,), percentile)).all())
    table = table_of(chain, components, percentile)
    if (np.diff(table) < 0).any():
        raise ValueError(
            "costs fall along the chain; raise them to their running maximum "
            "(t3c.core.conservative.increasing)"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(len(components), 0 if summaries is None else SUMMARY)
    proxies = np.array([proxy(profile, chain.profiles[-1]) for profile in chain])
    neutral = table.copy()
    if "latency_ms" in components:
        neutral[components.index("latency_ms")] = np.maximum.accumulate(proxies)
    places = _Places(neutral), _Places(table)
    for place in places:
        _imitate(network, place, steps // 2, generator)
    fitted = slice(None) if summaries is None else slice(None, None, 2)
    centre = scale = np.zeros(0)
    features = None
    if summaries is not None:
        centre, scale = summaries.mean(0), np.maximum(summaries.std(0), 1e-9)
        features = torch.from_numpy((summaries - centre) / scale).float()
    unit = max(float(drifts[:, 0].mean()), 1e-30)
    goal = _Goal(places[1], drifts / unit, table[0], time_price)
    _tune(network, goal, steps, generator)
    if features is not None:
        _teach(network, goal, features, fitted, steps, generator)
    rank = None
    if "latency_ms" in components:
        rank = _spearman(proxies, table[components.index("latency_ms")])
    exact, gap = _snapping(network, goal, generator)
    objective: tuple[tuple[float, float], ...] = ()
    floors: tuple[int, ...] = ()
    if features is not None:
        objective, floors = _compare(network, goal, features[1::2], goal.drifts[1::2])
    policy = Policy(components, percentile, table, *network.layers(), centre, scale, floors)
    return policy, Report(rank, exact, gap, objective)


def proxy(profile: Profile, largest: Profile) -> float:
    """A profile's cost where no device is known: multiply-adds and bytes, both relative."""
    compute = profile.macs / largest.macs
    stored = profile.storage_bytes / largest.storage_bytes
    return COMPUTE_SHARE * compute + (1.0 - COMPUTE_SHARE) * stored


class _Places:
    """Costs along a chain, in the units of the network, and back."""

    def __init__(self, table: Array) -> None:
        logs = np.log(table)
        width = np.maximum(logs[:, -1:] - logs[:, :1], 1e-9)
        self.units = torch.from_numpy((logs - logs[:, :1]) / width).float()
        self.count = table.shape[1]

    def draw(self, generator: torch.Generator, count: int = BATCH) -> Tensor:
        """Random budgets [count, components]."""
        kinds = self.units.shape[0]
        found = torch.rand(count, kinds, generator=generator) * (UNLIMITED - LEAST) + LEAST
        open_ = torch.rand(count, kinds, generator=generator) < UNLIMITED_SHARE
        one = torch.randint(kinds, (count,), generator=generator)
        open_[torch.arange(count), one] = False
        return torch.where(open_, torch.full_like(found, UNLIMITED), found)

    def feasible(self, budgets: Tensor) -> Tensor:
        """Largest profile that keeps each budget [count]; -1 where none does."""
        fits = (self.units[None] <= budgets[:, :, None] + 1e-7).all(1)
        return fits.sum(1) - 1

    def ideals(self, budgets: Tensor) -> Tensor:
        """The largest place, 0 to 1, at which each limit alone is kept [count, components]."""
        found = []
        for units, limits in zip(self.units, budgets.T, strict=True):
            below = (units <= limits[:, None] + 1e-7).sum(1) - 1
            k = below.clamp(0, self.count - 2)
            share = (limits - units[k]) / (units[k + 1] - units[k]).clamp(min=1e-6)
            at = torch.where(below < 0, torch.zeros_like(share), k + share.clamp(0, 1))
            found.append(at / (self.count - 1))
        return torch.stack(found, 1)


class _Goal:
    """What a place costs: drift of an input there, time, and limits that are exceeded."""

    def __init__(self, places: _Places, drifts: Array, times: Array, price: float) -> None:
        self.places, self.price = places, price
        self.drifts = torch.from_numpy(drifts).float()
        self.times = torch.from_numpy(times / times[-1]).float()

    def between(self, rows: Tensor, place: Tensor) -> Tensor:
        """Linear interpolation of [batch, profiles] at places 0 to 1 [batch]."""
        at = place.clamp(0, 1) * (self.places.count - 1)
        low = at.detach().floor().long().clamp(max=self.places.count - 2)
        share = at - low
        first = rows.gather(1, low[:, None]).squeeze(1)
        second = rows.gather(1, low[:, None] + 1).squeeze(1)
        found: Tensor = first * (1 - share) + second * share
        return found

    def __call__(self, place: Tensor, drifts: Tensor) -> Tensor:
        """Drift and time at places [batch]."""
        times = self.times.expand(len(place), -1)
        return self.between(drifts, place) + self.price * self.between(times, place)

    def excess(self, place: Tensor, budgets: Tensor) -> Tensor:
        """How far limits are exceeded [batch]."""
        rows = [row.expand(len(place), -1) for row in self.places.units]
        found = [self.between(row, place) - budgets[:, i] for i, row in enumerate(rows)]
        return torch.stack(found).clamp(min=0).sum(0)


def _imitate(network: _Network, places: _Places, steps: int, generator: torch.Generator) -> None:
    """Learn how far along the chain each limit lets a profile go."""
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    for step in range(steps):
        _cool(optimizer, RATE, step / steps)
        budgets = places.draw(generator)
        _descend(optimizer, (network.curves(budgets) - places.ideals(budgets)) ** 2)


def _cool(optimizer: torch.optim.Optimizer, rate: float, share: float) -> None:
    """Half a cosine from the rate to none."""
    for group in optimizer.param_groups:
        group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * share))


def _tune(network: _Network, goal: _Goal, steps: int, generator: torch.Generator) -> None:
    """Lower true drift within budgets; half of them see the snapped choice's."""
    optimizer = torch.optim.Adam(network.parameters(), RATE / 4)
    last = goal.places.count - 1
    mean = goal.drifts.mean(0)
    for step in range(steps):
        _cool(optimizer, RATE / 4, step / steps)
        budgets = goal.places.draw(generator)
        place = network(budgets)
        snapped = torch.minimum(_snapped(place, last), goal.places.feasible(budgets)) / last
        half = torch.arange(len(budgets)) % 2 == 0
        used = place + torch.where(half, (snapped - place).detach(), torch.zeros_like(place))
        loss = goal.between(mean.expand(len(used), -1), used)
        loss = loss + PENALTY * goal.excess(place, budgets)
        _descend(optimizer, loss + _beyond(place))


def _teach(
    network: _Network,
    goal: _Goal,
    features: Tensor,
    fitted: slice,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Learn what place inputs are content with: drift against the price of time."""
    assert network.content is not None
    drifts, summary, last = goal.drifts[fitted], features[fitted], goal.places.count - 1
    optimizer = torch.optim.AdamW(network.content.parameters(), RATE, weight_decay=0.01)
    for step in range(steps):
        _cool(optimizer, RATE, step / steps)
        which = torch.randint(len(drifts), (BATCH,), generator=generator)
        place = network.enough(summary[which])
        half = torch.arange(BATCH) % 2 == 0
        move = (_snapped(place, last) / last - place).detach()
        used = place + torch.where(half, move, torch.zeros_like(place))
        _descend(optimizer, goal(used, drifts[which]) + _beyond(place))


def _snapped(place: Tensor, last: int) -> Tensor:
    """The profile at or below each place, counted."""
    return (place.clamp(0, 1) * last + 1e-6).floor()


def _beyond(place: Tensor) -> Tensor:
    """A slope beyond the ends of the chain, where nothing else has one."""
    return (place - place.clamp(0, 1)).abs()


def _descend(optimizer: torch.optim.Optimizer, losses: Tensor) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(losses.mean())
    optimizer.step()


@torch.no_grad()
def _snapping(
    network: _Network, goal: _Goal, generator: torch.Generator
) -> tuple[float, tuple[float | None, ...]]:
    """How often rounding alone is exact, and what snapping costs in each profile."""
    budgets = goal.places.draw(generator, 4096)
    best = goal.places.feasible(budgets)
    budgets, best = budgets[best >= 0], best[best >= 0]
    place = network(budgets).clamp(0, 1)
    last = goal.places.count - 1
    exact = float((_snapped(place, last) == best).float().mean())
    mean = goal.drifts.mean(0).expand(len(budgets), -1)
    gap = goal.between(mean, best / last) - goal.between(mean, place)
    rows = [gap[best == k] for k in range(last + 1)]
    return exact, tuple(float(row.mean()) if len(row) else None for row in rows)


@torch.no_grad()
def _compare(
    network: _Network, goal: _Goal, summary: Tensor, drifts: Tensor
) -> tuple[tuple[tuple[float, float], ...], tuple[int, ...]]:
    """Objective of policy and chain by the largest feasible profile, and floors that follow."""
    last, floor = goal.places.count - 1, 0
    wanted = _snapped(network.enough(summary), last)
    rows: list[tuple[float, float]] = []
    floors = []
    for k in range(last + 1):
        chosen = wanted.clamp(floor, k) / last
        ours = float(goal(chosen, drifts).mean())
        chains = float(goal(torch.full_like(chosen, k / last), drifts).mean())
        if not ours < chains:
            floor = k
        rows.append((ours, chains))
        floors.append(floor)
    return tuple(rows), tuple(floors)


def _spearman(first: Sequence[float] | Array, second: Array) -> float:
    """Rank correlation; 1 where all ranks agree."""
    if len(second) < 2:
        return 1.0
    first_ranks, second_ranks = (_ranks(np.asarray(x)) for x in (first, second))
    found: Array = np.asarray(np.corrcoef(np.stack([first_ranks, second_ranks])))
    return float(found[0, 1])


def _ranks(values: Array) -> Array:
    """Ranks; equal values share their mean."""
    below = np.sum(values[None, :] < values[:, None], 1)
    equal = np.sum(values[None, :] == values[:, None], 1)
    return np.asarray(below + (equal - 1) / 2, np.float64)
