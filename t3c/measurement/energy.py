"""Joules of layers and of networks, by the meter of this machine.

Meters see everything that runs, and tick: a function repeats one layer, each copy with weights of
its own as in a network, and is called until one tick more or less does not matter.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from t3c.cost_models.dataset import Dataset, Joules, KernelEnergy, Metered, ProfileEnergy
from t3c.cost_models.meters import AbstractMeter, per_call
from t3c.measurement.hosts import Host
from t3c.measurement.units import Function, Unit

ERROR = 0.01
"""Share of a measured energy that a tick of the counter may be."""


def meter_units(
    dataset: Dataset,
    units: Sequence[Unit],
    host: Host,
    meter: AbstractMeter,
    limit: float,
    report: Callable[[str, int, int], None],
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Write the energies that a dataset lacks, unit by unit.

    Args:
        dataset: Where they go.
        units: Shards whose functions are of one layer each, and networks.
        host: This machine.
        meter: What measures.
        limit: When to stop, by `clock`.
        report: Called with (what, done, total).
        say: Told what is left.
        clock: Seconds, rising.

    Raises:
        CostModelError: The dataset has joules of another meter.
        TargetError: The meter stands still, or is too slow.
    """
    host.use_threads(dataset.device.threads)
    for i, unit in enumerate(units):
        if clock() >= limit:
            say(f"energy of {len(units) - i} units is left for the time; run again to go on")
            return
        loaded = host.load(unit)
        for function in unit.functions:
            if _row(unit, function, 1.0, meter).key in dataset.rows or clock() >= limit:
                continue
            run = loaded.runner(function)
            run()  # weights and instructions are met for the first time
            joules = per_call(meter, run, error=ERROR, clock=clock)
            dataset.append([_row(unit, function, joules, meter)], dataset.device)
        report("meter", i + 1, len(units))


def _row(unit: Unit, function: Function, joules: float, meter: AbstractMeter) -> Metered:
    """What is written of a function of which a call takes so many joules."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    if unit.network:
        energy = Joules(joules, meter.name, meter.label, when)
        return ProfileEnergy(unit.name, function.profile, function.rows, function.rest, energy)
    energy = Joules(joules / len(function.rows), meter.name, meter.label, when)
    return KernelEnergy(function.rows[0], energy, function.groups[0])
