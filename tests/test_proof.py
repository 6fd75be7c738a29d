"""What measuring does to profiles, with times that are made up."""

from dataclasses import replace
from typing import Any

import pytest

from t3c import targets
from t3c.core.conservative import increasing
from t3c.core.manifest import Manifest
from t3c.core.objective import Objective
from t3c.core.profile import Energy, Label
from t3c.proof import Bench, Notes
from tests.core.test_manifest import example


class Clock:
    """A session in which the smaller profile takes twice as long."""

    threads = 1

    def samples(
        self, names: list[str], inputs: dict[str, Any], rounds: int, warmup: int
    ) -> dict[str, list[float]]:
        return {name: [2.0 if i == 0 else 1.0] * rounds for i, name in enumerate(names)}


def timed(manifest: Manifest) -> tuple[Manifest, list[str]]:
    told: list[str] = []
    none: Any = None
    bench = Bench(none, targets.get("x86-64"), [(none,)], 3, 1, Notes(told.append), None)
    session: Any = Clock()
    return bench.timed(manifest, session), told


def test_a_slower_profile_is_dropped_where_time_is_the_objective() -> None:
    found, told = timed(example())
    assert [c.profile.name for c in found.profiles] == ["max"]
    assert told == ["dropped profile 'tiny': it took 2.00 times as long as 'max'"]


def test_a_slower_profile_stays_where_something_else_is_and_larger_ones_state_its_time() -> None:
    found, told = timed(replace(example(), objective=Objective.BYTES))
    assert [c.profile.name for c in found.profiles] == ["tiny", "max"]
    assert told == [
        "profile 'tiny' took 2.00 times as long as 'max'; it stays, the chain is for bytes"
    ]
    assert [c.profile.latency_ms for c in found.profiles] == pytest.approx([2000.0, 2000.0])


def test_energy_never_falls_along_a_chain() -> None:
    small, large = example().profiles

    def with_energy(joules: float, label: Label) -> list[Any]:
        low = replace(small, profile=replace(small.profile, energy=Energy(2.0, Label.ESTIMATED)))
        high = replace(large, profile=replace(large.profile, energy=Energy(joules, label)))
        return [low, high]

    raised = increasing(with_energy(1.0, Label.ESTIMATED))
    assert [c.profile.energy.joules for c in raised if c.profile.energy] == [2.0, 2.0]
    apart = increasing(with_energy(1.0, Label.MEASURED))  # measured and estimated never mix
    assert [c.profile.energy.joules for c in apart if c.profile.energy] == [2.0, 1.0]
