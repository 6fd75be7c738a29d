"""An artifact's policy is kept whole, picks within budgets, and is refused where it is wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import t3c
from t3c.core.artifact import Artifact, write_manifest
from t3c.core.budget import Budget, costs
from t3c.core.errors import ArtifactError, InfeasibleBudget, T3CError
from t3c.core.profile import Label, Timing
from t3c.runtime.policy import SUMMARY, Layers, Policy, PolicySelector, keep, stored
from t3c.runtime.session import load
from tests.runtime import toy

COSTS = ("latency_ms", "size_mb")


def policy(look_s: float = 2e-4, steep: float = 5.0, **changes: Any) -> Policy:
    """A policy for the toy: inputs of a mean above zero are content with the smallest profile."""
    curve = Layers(np.full((1, 1), 2.0), np.zeros(1), np.ones(1), 0.0)
    mean = np.zeros((1, SUMMARY))
    mean[0, 0] = -steep
    table = np.array([[1.0, 2.0], [1540e-6, 2052e-6]])
    base = Policy(
        COSTS,
        "p95",
        table,
        (curve, curve),
        Layers(mean, np.zeros(1), np.ones(1), 0.5),
        np.zeros(SUMMARY),
        np.ones(SUMMARY),
        (0, 0),
        look_s,
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The toy, without a policy."""
    return toy.write_native(tmp_path_factory.mktemp("toy") / "artifact")


@pytest.fixture
def artifact(bare: Artifact, tmp_path: Path) -> Artifact:
    """The toy with a policy of its own."""
    shutil.copytree(bare.path, tmp_path / "copy")
    return keep(Artifact.read(tmp_path / "copy"), policy(), {"why": "test"})


EASY, HARD = np.full((toy.ROWS, toy.K), 1, np.float32), np.full((toy.ROWS, toy.K), -1, np.float32)


def test_a_policy_is_a_hashed_file_that_the_manifest_names(artifact: Artifact) -> None:
    again = Artifact.read(artifact.path)
    assert again.manifest == artifact.manifest
    again.verify()
    found = stored(again)
    assert found is not None
    assert found.to_json() == policy().to_json()
    first = artifact.manifest.policy
    other = keep(again, policy(look_s=1e-3), {})
    assert other.manifest.policy != first
    assert [p.name for p in artifact.path.glob("policy.*")] == [other.manifest.policy]
    other.verify()
    assert keep(other, policy(look_s=1e-3), {}).manifest == other.manifest


def test_a_policy_is_off_unless_asked_for(artifact: Artifact) -> None:
    session = load(artifact)
    assert session.policy is None
    with pytest.raises(T3CError, match=r"fit one with `t3c policy --looks`"):
        session.set_budget(latency_ms=3, inputs=[EASY])
    assert session.policy_seconds == 0.0


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_budgets_alone_pick_what_the_chain_picks(artifact: Artifact, wanted: Any) -> None:
    ours, chain = load(artifact, policy=wanted), load(artifact)
    for limit in (1.0, 1.5, 2.0, 9.0):
        assert ours.set_budget(latency_ms=limit) == chain.set_budget(latency_ms=limit)
        assert ours.set_budget(max_drift=1, latency_ms=9).name == "max"
    with pytest.raises(InfeasibleBudget, match="smallest feasible budget is latency_ms=1"):
        ours.set_budget(latency_ms=0.5)
    assert ours.policy_seconds > 0


def test_an_input_takes_less_never_more_and_looking_counts_as_latency(artifact: Artifact) -> None:
    session = load(artifact, policy=True)
    assert session.set_budget(latency_ms=9, inputs=[EASY]).name == "tiny"
    assert session.set_budget(latency_ms=9, inputs={"x": torch.from_numpy(HARD)}).name == "max"
    assert session.set_budget(latency_ms=2.3, inputs=[HARD]).name == "max"
    assert session.set_budget(latency_ms=2.1, inputs=[HARD]).name == "tiny"  # .2 ms for the look
    assert session.set_budget(latency_ms=2.1).name == "max"
    assert session.set_budget(latency_ms=1.1, inputs=[HARD]).name == "tiny"
    assert session.set_budget(size_mb=2e-3, inputs=[HARD]).name == "tiny"
    nan = np.full_like(EASY, np.nan)
    assert session.set_budget(latency_ms=9, inputs=[nan]).name == "max"
    with pytest.raises(InfeasibleBudget):
        session.set_budget(latency_ms=0.9, inputs=[EASY])
    with pytest.raises(TypeError, match="missing input 'x'"):
        session.set_budget(latency_ms=9, inputs=[])


def test_for_one_input_more_budget_never_picks_less_though_looking_costs() -> None:
    ours = PolicySelector(toy.manifest().chain, policy(look_s=3e-4))
    rng = np.random.default_rng(0)
    for x in [*rng.normal(0, 0.2, (20, SUMMARY)), np.zeros(SUMMARY)]:
        picked = [ours.index(Budget(latency_ms=limit), x) for limit in np.linspace(1, 3, 81)]
        assert picked == sorted(picked)


def test_the_call_and_the_look_together_keep_every_limit() -> None:
    ours, chain = PolicySelector(toy.manifest().chain, policy(look_s=3e-4)), toy.manifest().chain
    rng, looked = np.random.default_rng(1), 0
    for _ in range(2000):
        budget = Budget(latency_ms=rng.uniform(1, 3), size_mb=rng.uniform(1.6e-3, 3e-3))
        index = ours.index(budget, rng.normal(0, 0.2, SUMMARY))
        cost = costs(chain.profiles[index])
        assert cost["size_mb"] <= budget.costs["size_mb"]
        look_ms = ours.policy.look_s * 1e3 if index else 0.0  # the smallest runs without a look
        assert cost["latency_ms"] <= budget.costs["latency_ms"] - look_ms
        looked += index > 0
    assert looked > 50


def test_where_the_chain_decides_inputs_are_not_looked_at(artifact: Artifact) -> None:
    strict = keep(artifact, policy(floors=(0, 1)), {})
    session = load(strict, policy=True)
    session.set_budget(latency_ms=2.1, inputs=[object()])  # no statistics of it exist
    assert session.profile.name == "max"  # nothing was taken from the limit for a look


def test_costs_that_are_measured_anew_make_a_policy_stale(artifact: Artifact) -> None:
    timing = Timing(3e-3, 4e-3, Label.MEASURED, 20)
    first, last = artifact.manifest.profiles
    slower = replace(last, profile=replace(last.profile, latency=timing))
    write_manifest(artifact.path, replace(artifact.manifest, profiles=(first, slower)))
    with pytest.raises(T3CError, match="fitted to other costs"):
        load(artifact.path, policy=True)
    session = load(artifact.path, policy="auto")
    assert session.policy is None
    assert session.set_budget(latency_ms=3).name == "tiny"


def test_a_policy_that_is_missing_or_of_another_artifact_is_refused(
    bare: Artifact, artifact: Artifact
) -> None:
    with pytest.raises(ArtifactError, match="no policy in it; fit one with `t3c policy`"):
        load(bare, policy=True)
    assert load(bare, policy="auto").policy is None
    with pytest.raises(ValueError, match="policy is 'yes'; allowed are False, True, 'auto'"):
        load(bare, policy="yes")  # type: ignore[arg-type]
    with pytest.raises(T3CError, match="fitted to other costs"):
        keep(artifact, policy(table=policy().table * 2), {})
    assert t3c.export(artifact, ["tiny"], artifact.path.parent / "small").manifest.policy is None


def test_a_damaged_policy_is_refused_by_its_hash_and_by_its_content(artifact: Artifact) -> None:
    assert artifact.manifest.policy is not None
    file = artifact.path / artifact.manifest.policy
    whole = file.read_text()
    file.write_text(whole.replace("0.5", "0.6"))
    with pytest.raises(ArtifactError, match="its SHA-256 is not the one"):
        load(artifact.path, policy=True)
    for bad, why in (
        ("[" + " " * (len(whole) - 1), "fit it again with `t3c policy`"),
        ("[]".ljust(len(whole)), "fit it again"),
        (json.dumps({**json.loads(whole), "schema": 9}, indent=1), "policy schema 9, known is 1"),
        (json.dumps({**json.loads(whole), "components": ["time"]}, indent=1), "components are"),
        (json.dumps({**json.loads(whole), "look_s": None}, indent=1), "this policy is damaged"),
        (whole.replace("0.5", "NaN"), "NaN or infinity"),
    ):
        file.write_text(bad.ljust(len(whole))[: len(whole)] if len(bad) < len(whole) else bad)
        entry = next(f for f in artifact.manifest.files if f.path == file.name)
        sized = replace(entry, bytes=file.stat().st_size)
        files = tuple(sized if f is entry else f for f in artifact.manifest.files)
        write_manifest(artifact.path, replace(artifact.manifest, files=files))
        with pytest.raises(ArtifactError, match=why):
            load(artifact.path, hashes=False, policy=True)
    file.unlink()
    with pytest.raises(ArtifactError, match="missing; copy the whole folder"):
        load(artifact.path)
    write_manifest(artifact.path, replace(artifact.manifest, policy="policy.none.json"))
    with pytest.raises(ArtifactError, match=r"files does not list 'policy\.none\.json'"):
        load(artifact.path)


def test_the_parts_of_a_policy_must_fit_together() -> None:
    with pytest.raises(ValueError, match=r"a network's weights are .*\[n\] and \[n\] fit"):
        Layers(np.ones((2, 1)), np.zeros(1), np.ones(2), 0.0)
    wide = Layers(np.ones((1, 2)), np.zeros(1), np.ones(1), 0.0)
    with pytest.raises(ValueError, match="latency_ms takes more than one limit"):
        policy(curves=(wide, wide))
    with pytest.raises(ValueError, match="a summary has 4 features"):
        policy(content=wide)
    with pytest.raises(ValueError, match="scale above 0"):
        policy(scale=np.zeros(SUMMARY))
    with pytest.raises(ValueError, match="must be positive, finite numbers"):
        policy(table=np.array([[0.0, 1.0], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="percentile 'p99'"):
        policy(percentile="p99")
