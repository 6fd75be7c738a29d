"""Proven bounds on the drift of every profile of a chain, over a domain."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from t3c.certificate.sound.domain import Domain
from t3c.certificate.sound.form import Form, Mode, NoRule
from t3c.certificate.sound.norms import largest_norm
from t3c.certificate.sound.propagate import spread
from t3c.core.certificate import Sound
from t3c.core.errors import CertificateError
from t3c.core.profile import Profile, ProfileChain
from t3c.elastic.model import ElasticModel

CAP = 4000
"""Most symbols of the original and of the difference, each."""


@dataclass(frozen=True, slots=True)
class _Found:
    """The largest over the cells.

    Attributes:
        drift: Bound of ||dz||_2.
        extent: Bound of the diameter of the original's outputs.
    """

    drift: float
    extent: float


def sound_bounds(
    elastic: ElasticModel,
    chain: ProfileChain,
    domain: Domain,
    *,
    mode: Mode = "symbols",
    cap: int = CAP,
) -> dict[str, Sound]:
    """An upper bound on ||dz||_2 for each profile and every input in the domain.

    Holds for any program that rounds activations as t3c.core.ops says and whose sums of n products
    are within gamma_(n + 8) of exact ones relative to the sum of magnitudes: direct sums in any
    order. Winograd and FFT convolutions are not such sums. Underflow is taken to be harmless. All
    outputs of a call count together.

    Args:
        elastic: The model.
        chain: Its profiles.
        domain: Flat inputs, as the graph takes them.
        mode: What is propagated; ``symbols`` is the tightest but for rare cases.
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
    found = {p.name: _profile(elastic, p, domain, mode, cap) for p in chain}
    largest = list(found)[-1]
    reached, made = 0.0, {}
    for name in reversed(list(found)):
        seen = found[name]
        if isinstance(seen, str):
            made[name] = Sound("unavailable", math.inf, math.inf, math.inf, domain.text, seen)
            reached = math.inf
            continue
        reached = max(reached, seen.drift)
        top = found[largest]
        teacher = (
            0.0 if name == largest else math.inf if isinstance(top, str) else seen.drift + top.drift
        )
        status, reason = ("bound", "") if math.isfinite(reached) else ("unavailable", _LARGER)
        if status == "bound" and reached >= seen.extent:
            status = "vacuous"
            reason = f"not below {seen.extent:.3g}, the extent of the original's outputs"
        made[name] = Sound(status, reached, seen.drift, teacher, domain.text, reason)  # type: ignore[arg-type]
    return {name: made[name] for name in found}


_LARGER = "a larger profile has no finite bound"


def _profile(
    elastic: ElasticModel, profile: Profile, domain: Domain, mode: Mode, cap: int
) -> _Found | str:
    drift = extent = 0.0
    try:
        with torch.no_grad(), elastic.using(profile.formats):
            for cell in domain.cells:
                pairs, _ = spread(elastic, cell, mode, cap)
                if not pairs:
                    raise CertificateError("the model has no float output to bound")
                drift = max(drift, _together([p.d for p in pairs]))
                wide: list[Tensor] = [(p.x.high - p.x.low).flatten() for p in pairs]
                extent = max(extent, float(torch.cat(wide).norm()))
    except NoRule as error:
        return str(error)
    return _Found(drift, extent)


def _together(forms: list[Form]) -> float:
    return math.sqrt(sum(largest_norm(f) ** 2 for f in forms))


def certify(elastic: ElasticModel, chain: ProfileChain, domain: Domain) -> ProfileChain:
    """The chain with `certificate.sound` of every profile filled in."""
    found = sound_bounds(elastic, chain, domain)
    return ProfileChain(
        tuple(replace(p, certificate=replace(p.certificate, sound=found[p.name])) for p in chain)
    )
