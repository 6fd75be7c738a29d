"""Proven bounds on the drift of every profile of a chain, over a domain."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from t3c.certificate.sound.domain import Ball, Cell, Domain, Region
from t3c.certificate.sound.form import Form, Mode, NoRule
from t3c.certificate.sound.norms import largest_norm
from t3c.certificate.sound.propagate import spread
from t3c.core.certificate import Sound
from t3c.core.errors import CertificateError
from t3c.core.profile import Profile, ProfileChain
from t3c.elastic.model import ElasticModel

CAP = 4000
"""Most symbols of the original and of the difference, each."""
POINTS = 256
"""Inputs at which the original's outputs are looked at, over all cells, but at least `CORNERS` of
each."""
CORNERS = 4


def sound_bounds(
    elastic: ElasticModel,
    chain: ProfileChain,
    domain: Domain,
    *,
    mode: Mode | None = None,
    cap: int = CAP,
) -> dict[str, Sound]:
    """An upper bound on ||dz||_2 for each profile and every input in the domain.

    Holds for any program that rounds activations as t3c.core.ops says, whose sums of n products
    are within gamma_(n + 8) of exact ones relative to the sum of magnitudes (direct sums in any
    order), whose norms take variances in two passes or by Welford's update, and whose exponentials
    are within 64 units of round-off. Winograd and FFT convolutions are no such sums, and TVM's own
    layer norm, which CUDA libraries have, takes variances in one pass. Attention in 16-bit codes
    is covered. Underflow is taken to be harmless. All outputs of a call count together.

    A bound is ``vacuous`` if it is not below the extent of the original's outputs over the domain:
    the L2 length of their ranges, seen at points of every cell, which is never above the true one.

    Args:
        elastic: The model.
        chain: Its profiles.
        domain: Flat inputs, as the graph takes them.
        mode: What is propagated; None: the least of ``symbols``, which is the tightest but for
            rare cases, ``both`` and ``interval``, in each cell.
        cap: Most symbols; fewer are faster and looser.

    Returns:
        Profile name -> bound, smallest profile first; never rising along the chain.

    Raises:
        ValueError: The domain does not fit the model's inputs.
        CertificateError: A profile has corrections of means and variances, for which no rule is.
    """
    if corrected := [p.name for p in chain if elastic.corrections(p.formats)]:
        raise CertificateError(
            f"profile {corrected[0]!r} has corrected means and variances, which no proof here "
            "knows; call elastic.forget_corrections() first and lower without them"
        )
    modes: tuple[Mode, ...] = ("symbols", "both", "interval") if mode is None else (mode,)
    found = {p.name: _profile(elastic, p, domain, modes, cap) for p in chain}
    extent = _extent(elastic, domain)
    largest = list(found)[-1]
    top = found[largest]
    reached, made = 0.0, {}
    for name in reversed(list(found)):
        seen = found[name]
        if isinstance(seen, str):
            made[name] = Sound("unavailable", math.inf, math.inf, math.inf, domain.text, seen)
            reached = math.inf
            continue
        reached = max(reached, seen)
        teacher = math.inf if isinstance(top, str) else seen + top
        teacher = 0.0 if name == largest else teacher
        status, reason = ("bound", "") if math.isfinite(reached) else ("unavailable", _LARGER)
        if status == "bound" and reached >= extent:
            status = "vacuous"
            reason = f"not below {extent:.3g}, the extent of the original's outputs"
        made[name] = Sound(status, reached, seen, teacher, domain.text, reason)  # type: ignore[arg-type]
    return {name: made[name] for name in found}


_LARGER = "a larger profile has no finite bound"


def _profile(
    elastic: ElasticModel, profile: Profile, domain: Domain, modes: tuple[Mode, ...], cap: int
) -> float | str:
    """The largest bound over the cells, or why there is none."""
    drift = 0.0
    with torch.no_grad(), elastic.using(profile.formats):
        for cell in domain.cells:
            best, why = math.inf, ""
            for mode in modes:
                try:
                    best = min(best, _cell(elastic, cell, mode, cap))
                except NoRule as error:
                    why = why or str(error)
            if not math.isfinite(best):
                return why or "no finite bound"
            drift = max(drift, best)
    return drift


def _cell(elastic: ElasticModel, cell: Cell, mode: Mode, cap: int) -> float:
    pairs, _ = spread(elastic, cell, mode, cap)
    if not pairs:
        raise CertificateError("the model has no float output to bound")
    return _together([p.d for p in pairs])


def _together(forms: list[Form]) -> float:
    return math.sqrt(sum(largest_norm(f) ** 2 for f in forms))


def _extent(elastic: ElasticModel, domain: Domain) -> float:
    """The L2 length of the ranges that the original's outputs have at points of the domain."""
    numbers = torch.Generator().manual_seed(0)
    each = max(CORNERS, POINTS // len(domain.cells))
    low: list[Tensor] = []
    high: list[Tensor] = []
    with torch.no_grad(), elastic.using(None):
        for cell in domain.cells:
            for _ in range(each):
                outputs = elastic.graph(*[_point(region, numbers) for region in cell])
                now = [y.double() for y in outputs if y.is_floating_point()]
                low = [torch.minimum(a, b) for a, b in zip(low or now, now, strict=True)]
                high = [torch.maximum(a, b) for a, b in zip(high or now, now, strict=True)]
    ranges = [(b - a).flatten() for a, b in zip(low, high, strict=True)]
    return float(torch.cat(ranges).norm()) if ranges else math.inf


def _point(region: Region, numbers: torch.Generator) -> Tensor:
    """A corner of a box, a point of a ball's sphere."""
    if isinstance(region, Ball):
        turn = torch.randn(region.center.shape, generator=numbers)
        away = region.radius * (1 - 1e-6) * turn / turn.norm()
        point: Tensor = region.center + away.to(region.center)
        return point
    up = torch.rand(region.low.shape, generator=numbers) < 0.5
    return torch.where(up, region.high, region.low)


def certify(elastic: ElasticModel, chain: ProfileChain, domain: Domain) -> ProfileChain:
    """The chain with `certificate.sound` of every profile filled in."""
    found = sound_bounds(elastic, chain, domain)
    return ProfileChain(
        tuple(replace(p, certificate=replace(p.certificate, sound=found[p.name])) for p in chain)
    )
