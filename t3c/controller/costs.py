"""Costs of a site in a format, for every objective, and the energy of a whole profile."""

import math
from collections.abc import Mapping, Sequence

from t3c.core.code_storage import CodeStorage
from t3c.core.codes import GROUP
from t3c.core.errors import TargetError
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.objective import Goal, Mix, Objective
from t3c.core.sites import LinearSite, Site
from t3c.cost_models.energy import EnergyModel
from t3c.targets.base import TargetSpec

ENERGY = EnergyModel()


def site_costs(
    objective: Goal,
    site: Site,
    menu: Sequence[Format],
    seconds: Sequence[float],
    codes: CodeStorage = CodeStorage.NESTED,
    whole: Mapping[Objective, float] | None = None,
    joules: Sequence[float] | None = None,
) -> list[float]:
    """Cost of a site in each format of its menu, in units of the objective.

    Args:
        objective: What counts.
        site: The site.
        menu: Its formats.
        seconds: Predicted time of each.
        codes: How dense codes of 8 and of 4 bits are stored, where the menu has both.
        whole: Of a mix: what the dense network costs (`dense_costs`).
        joules: Energy of each, learnt from a meter; None: it is estimated.
    """
    match objective:
        case Mix(parts):
            total = whole if whole is not None else {}
            each = [
                [
                    cost / total[part]
                    for cost in site_costs(part, site, menu, seconds, codes, joules=joules)
                ]
                for part in parts
            ]
            return [math.fsum(costs) / len(parts) for costs in zip(*each, strict=True)]
        case Objective.LATENCY:
            return list(seconds)
        case Objective.MACS:
            return [float(site.macs(fmt)) for fmt in menu]
        case Objective.BYTES:
            return [float(size) for size in _sizes(site, menu, codes)]
        case Objective.ENERGY if joules is not None:
            return list(joules)
        case Objective.ENERGY:
            sizes = _sizes(site, menu, codes)
            return [ENERGY.site(site.macs(f), n) for f, n in zip(menu, sizes, strict=True)]


def dense_costs(
    objective: Goal,
    sites: Sequence[Site],
    seconds: Sequence[float],
    joules: Sequence[float] | None = None,
) -> dict[Objective, float]:
    """Each part of an objective -> its cost of all sites in 8 bits.

    Args:
        objective: What counts.
        sites: All of them.
        seconds: Predicted time of each in 8 bits.
        joules: Energy of each, learnt from a meter; None: it is estimated.
    """
    each = [None] * len(sites) if joules is None else [[j] for j in joules]
    return {
        part: math.fsum(
            site_costs(part, site, [Dense(8)], [t], joules=j)[0]
            for site, t, j in zip(sites, seconds, each, strict=True)
        )
        for part in objective.parts
    }


def _sizes(site: Site, menu: Sequence[Format], codes: CodeStorage) -> list[int]:
    nested = codes is CodeStorage.NESTED and {Dense(8), Dense(4)} <= set(menu)
    return [storage_bytes(site, fmt, nested=nested) for fmt in menu]


def check(objective: Goal, spec: TargetSpec) -> None:
    """Refuse an objective that a target has no formats for.

    Raises:
        TargetError: Bytes fall by 4-bit weights first, and the target has no such kernels.
    """
    if Objective.BYTES in objective.parts and not has_four_bits(spec):
        raise TargetError(
            f"objective {str(objective)!r} needs kernels of 4-bit weights, and target "
            f"{spec.name!r} has none; use 'latency', 'macs' or 'energy' there"
        )


def has_four_bits(spec: TargetSpec) -> bool:
    """Whether the target has kernels of 4-bit weights, for linear layers."""
    return spec.roofline.int4_macs_s is not None


def storage_bytes(site: Site, fmt: Format, *, nested: bool = False) -> int:
    """Estimated bytes of a site: codes, a float32 scale for each output row, the float32 bias.

    4-bit codes have a scale of two bytes for each row and group of 64 inputs instead.

    Args:
        site: The site.
        fmt: Its format.
        nested: Whether dense 8-bit codes contain those of 4 bits, and have their scales.
    """
    outputs = site.n if isinstance(site, LinearSite) else site.out_channels
    if fmt.bits == 4 and isinstance(site, LinearSite):
        groups = outputs * math.ceil(site.k / GROUP)
        if isinstance(fmt, LowRank):
            groups = fmt.rank * math.ceil(site.k / GROUP) + outputs * math.ceil(fmt.rank / GROUP)
        return math.ceil(site.elements(fmt) / 2) + 2 * groups + 4 * outputs
    match fmt:
        case Dense() if nested and isinstance(site, LinearSite):
            return site.elements(fmt) + 2 * outputs * math.ceil(site.k / GROUP) + 4 * outputs
        case Dense():
            scales = outputs
        case LowRank(rank):
            scales = outputs + rank
        case Tucker2(rank_in, rank_out):
            scales = outputs + rank_in + rank_out
        case CP(rank):
            scales = outputs + rank
    return math.ceil(site.elements(fmt) * fmt.bits / 8) + 4 * (scales + outputs)
