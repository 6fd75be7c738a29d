import math

import pytest
import torch
from torch import Tensor, nn

from t3c.certificate.observed import certify, observed
from t3c.controller.plan import plan
from t3c.core.errors import CertificateError
from t3c.core.formats import Dense, Format, LowRank
from t3c.targets import get
from tests.controller.models import block, elastic, linear, mlp, more


def test_the_original_does_not_drift() -> None:
    model = mlp()
    found = observed(model, None, more(model, 3))
    assert (found.mean, found.max, found.relative, found.flips) == (0.0, 0.0, 0.0, 0.0)
    assert found.inputs == 24


def test_statistics_are_those_of_the_outputs() -> None:
    model = mlp()
    formats: dict[str, Format] = {"fc0": LowRank(4), "head": Dense(8)}
    batches = more(model, 4)
    found = observed(model, formats, batches)
    before = torch.cat([model(*b)[0].detach() for b in batches])
    with torch.no_grad(), model.using(formats):
        after = torch.cat([model(*b)[0] for b in batches])
    drift = (after - before).norm(dim=1)
    assert found.mean == pytest.approx(float(drift.mean()), rel=1e-5)
    assert found.median == pytest.approx(float(drift.quantile(0.5)), rel=1e-5)
    assert found.max == pytest.approx(float(drift.max()), rel=1e-5)
    assert found.median <= found.p95 <= found.max
    assert found.relative == pytest.approx(
        float(drift.mean() / before.norm(dim=1).mean()), rel=1e-5
    )
    flipped = (after.argmax(1) != before.argmax(1)).float().mean()
    assert found.flips == pytest.approx(float(flipped))


def test_outputs_that_are_no_scores_have_no_flips() -> None:
    model = block()
    found = observed(model, dict.fromkeys(model.sites, Dense(8)), more(model, 2))
    assert found.flips is None
    assert found.inputs == 2
    assert 0 < found.relative < 0.1


def test_every_profile_is_certified_and_smaller_ones_drift_more() -> None:
    model = mlp()
    batches = more(model, 4)
    found = plan(model, batches, get("x86-avx2"), seconds=2)
    told: list[tuple[str, int, int]] = []
    chain = certify(model, found.chain, more(model, 4, 9), progress=lambda *a: told.append(a))
    seen = [p.certificate.observed for p in chain]
    assert all(o is not None and 0 < o.mean < math.inf for o in seen)
    assert seen[0] is not None
    assert seen[-1] is not None
    assert seen[0].mean >= seen[-1].mean
    for one in seen:  # both columns; the triangle holds between them
        assert one is not None
        assert one.teacher is not None
        assert abs(one.mean - one.teacher.mean) <= seen[-1].mean + 1e-6
    assert seen[-1].teacher is not None
    assert (seen[-1].teacher.max, seen[-1].teacher.flips) == (0.0, 0.0)
    assert seen[0].teacher is not None
    assert seen[0].teacher.mean > 0
    assert told[-1] == ("observing drift", len(chain), len(chain))
    assert [p.formats for p in chain] == [p.formats for p in found.chain]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = linear("fc", 64, 64, 2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.fc(x).log().sqrt(),)


class Indices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = linear("fc", 64, 64, 2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.fc(x).argmax(1),)


def test_what_cannot_be_compared_is_refused() -> None:
    x = torch.randn(2, 64)
    with pytest.raises(CertificateError, match="at least one batch"):
        observed(mlp(), None, [])
    with pytest.raises(CertificateError, match="original outputs are not finite"):
        observed(elastic(Broken(), x), None, [(x,)])
    with pytest.raises(CertificateError, match="no floating-point output"):
        observed(elastic(Indices(), x), None, [(x,)])
