"""What held-out data adds to an artifact: bounds, labels, shifted data, a policy."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import t3c
from t3c import targets
from t3c.core.artifact import Artifact
from t3c.core.errors import CertificateError
from tests.lowering import Mlp, draw, small
from tests.runtime import toy

pytestmark = pytest.mark.skipif(
    not targets.cpu_features() & {"sse2"}, reason="target x86 runs on x86-64 only"
)


def test_bounds_come_from_the_library_and_stay_in_the_artifact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mlp().eval()
    artifact = small(model=model, example_inputs=(draw(0, 2, 96),), out=tmp_path / "net")
    shape = artifact.manifest.inputs[0].shape
    inputs = [(torch.randn(shape),) for _ in range(30)]
    told: list[str] = []
    found = t3c.certify(artifact, model, inputs, say=told.append)
    assert Artifact.read(artifact.path).manifest == found.manifest
    t3c.load(found)  # the files are those that the manifest lists
    bounds = [c.profile.certificate.calibrated for c in found.manifest.profiles]
    count = 30 * shape[0]
    for small_one, large_one in pairwise(bounds):
        assert small_one is not None
        assert large_one is not None
        assert small_one.inputs == large_one.inputs == count
        for a, b in zip(small_one.bounds, large_one.bounds, strict=True):
            assert a.value >= b.value
    assert bounds[-1] is not None
    ninety = bounds[-1].at(0.9)
    assert ninety is not None
    drift = [
        float((run(*inputs[0])["logits"] - model(*inputs[0])["logits"]).detach().norm())
        for run in [t3c.load(found).variants["max"]]
    ]
    assert 0 < ninety.value < 50 * drift[0]
    assert ninety.teacher == 0.0
    assert any("promise nothing" in line for line in told)
    assert all(c.profile.certificate.labels is None for c in found.manifest.profiles)
    with pytest.raises(CertificateError, match="labels need a model with one output"):
        t3c.certify(found, model, inputs, labels=[0] * count, say=told.append)


def labelled_and_shifted(artifact: Artifact, model: nn.Module, inputs: list[Any]) -> None:
    """With right answers and other data, the artifact says what becomes of both."""
    with torch.no_grad():
        truth = torch.cat([model(*args) for args in inputs]).argmax(1)
    far = [(8 * x,) for (x,) in inputs[:9]]
    told: list[str] = []
    found = t3c.certify(
        artifact, model, inputs, labels=truth, shifted=far, levels=(0.8, 0.9), say=told.append
    )
    assert Artifact.read(artifact.path).manifest == found.manifest
    assert any("shifted inputs the bounds of 80% cover" in line for line in told)
    for one in (c.profile.certificate for c in found.manifest.profiles):
        assert one.calibrated is not None
        assert one.calibrated.shifted is not None
        assert one.calibrated.shifted.coverage[0] < 0.5
        assert len({d.sha256 for d in one.calibrated.draws}) == 3
        assert one.labels is not None
        assert one.labels.accuracy == pytest.approx(1 - one.labels.flips)
        assert one.labels.original_accuracy == 1.0
        assert [c.level for c in one.labels.checked] == [0.8, 0.9]
        assert all(d.accuracy == d.agreement is not None for d in one.calibrated.draws)
    session = t3c.load(found)
    with pytest.raises(CertificateError, match="run `t3c certify` on 200 held-out inputs"):
        session.drift_bound(session(*inputs[0]))
    many = [(torch.randn(inputs[0][0].shape),) for _ in range(150)]
    session = t3c.load(t3c.certify(artifact, model, many, say=told.append))
    for name in session.variants:
        session.set_profile(name)
        off = [(session(*args) - model(*args)).detach().norm(dim=1).numpy() for args in inputs]
        most = [session.drift_bound(session(*args), 0.99) for args in inputs]
        assert np.mean(np.array(off) <= np.array(most)) > 0.9
        assert np.median(np.array(most) / np.array(off)) < 5
    session = t3c.load(t3c.certify(artifact, model, many[:50], teaching=many[50:], say=told.append))
    single = [p.certificate.per_input for p in session.profiles]
    assert [(b.inputs, b.taught) for b in single if b is not None] == [(100, 200)] * len(single)
    assert session.drift_bound(session(*inputs[0])).shape == (2,)
    with pytest.raises(CertificateError, match="2 inputs teach and are held out; bounds"):
        t3c.certify(artifact, model, many[:51], teaching=many[50:], say=told.append)
    session = t3c.load(found)
    ninety = session.profiles[-1].certificate.calibrated
    assert ninety is not None
    limit = ninety.bounds[1].value
    assert session.set_budget(max_drift=limit).certificate.calibrated is not None
    with pytest.raises(t3c.InfeasibleBudget, match=r"not at 0\.95"):
        session.set_budget(max_drift=limit, level=0.95)
    with pytest.raises(ValueError, match="give one for each of the"):
        t3c.certify(artifact, model, inputs, labels=[1], say=told.append)


def test_bounds_come_with_labels_and_need_the_model_that_was_lowered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    artifact = small(model=model, out=tmp_path / "net")
    shape = artifact.manifest.inputs[0].shape
    labelled_and_shifted(artifact, model, [(torch.randn(shape),) for _ in range(30)])
    with pytest.raises(CertificateError, match="give the model that was lowered"):
        t3c.certify(artifact, nn.Identity(), [(torch.randn(shape),)], say=lambda line: None)
    with pytest.raises(CertificateError, match="needs held-out inputs; got none"):
        t3c.certify(artifact, nn.Identity(), [], say=lambda line: None)


@pytest.mark.parametrize("looks", [False, True])
def test_a_policy_is_fitted_to_the_library_and_picks_within_budgets(
    looks: bool, tmp_path: Path
) -> None:
    artifact = toy.write_native(tmp_path / "toy")
    dense = torch.from_numpy(toy.tensors()["fc.dense"])

    def model(x: Tensor) -> dict[str, Tensor]:
        logits = x @ dense.T + 0.5
        return {"logits": logits, "double": 2 * logits}

    inputs = [(torch.from_numpy(toy.inputs(seed)),) for seed in range(16)]
    told: list[str] = []
    found = t3c.fit_policy(artifact, model, inputs, looks=looks, steps=60, say=told.append)
    assert Artifact.read(found.path).manifest == found.manifest
    assert any("the network alone is right for" in line for line in told)
    assert any("inputs choose pays" in line for line in told) == looks
    session, chain = t3c.load(found, policy=True), t3c.load(artifact)
    assert session.policy is not None
    assert session.policy.components == ("latency_ms", "size_mb", "ram_mb")
    assert (session.policy.look_s > 0) == looks
    for limit in np.linspace(1, 3, 21):
        assert session.set_budget(latency_ms=limit) == chain.set_budget(latency_ms=limit)
        if looks:
            chosen = session.set_budget(latency_ms=limit, inputs=inputs[0])
            assert chosen.latency_ms is not None
            assert chosen.latency_ms <= limit
    report = json.loads((found.path / str(found.manifest.policy)).read_text())["report"]
    assert len(report["snapping_gap"]) == 2
    assert report["proxy_rank_correlation"] == pytest.approx(1.0)
    with pytest.raises(CertificateError, match="got none"):
        t3c.fit_policy(found, model, [], say=told.append)
    with pytest.raises(ValueError, match="3 inputs; a policy that looks at them"):
        t3c.fit_policy(found, model, inputs[:3], looks=True, say=told.append)
    single = t3c.export(found, ["max"], tmp_path / "one")
    with pytest.raises(ValueError, match="a chain of one profile"):
        t3c.fit_policy(single, model, inputs, say=told.append)
