"""Labels: what a bound fixes does not flip, shares are counted right, wrong answers are refused."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from t3c.certificate.labels import Classes, expected_calibration_error, label_effects
from t3c.core.certificate import Checked, Labels, Sound
from t3c.core.errors import CertificateError

CLASSES = 5


def logits(count: int, seed: int) -> Tensor:
    return 2 * torch.randn(count, CLASSES, generator=torch.Generator().manual_seed(seed))


def drifted(z: Tensor, size: float | Tensor, seed: int) -> Tensor:
    step = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    moved: Tensor = z + size * step / step.norm(dim=1, keepdim=True)
    return moved


def effects(
    before: Tensor,
    after: dict[str, Tensor],
    truth: object = None,
    sound: dict[str, Sound | None] | None = None,
    level: float = 0.9,
) -> dict[str, Labels]:
    classes = Classes.of(before, after)
    if truth is not None:
        classes = classes.told(truth)
    drift = {name: (y - before).norm(dim=1).double().numpy() for name, y in after.items()}
    return label_effects(classes, drift, (level,), sound or dict.fromkeys(after))


def test_flips_confidence_and_accuracy_are_counted() -> None:
    before = torch.tensor([[3.0, 0, 0], [0, 2, 0], [0, 0, 1], [1, 0, 0]])
    after = torch.tensor([[3.0, 0, 0], [2, 0, 0], [0, 0, 4], [1, 0, 0]])
    found = effects(before, {"tiny": after, "max": before}, [0, 1, 2, 2])["tiny"]
    assert found.flips == found.teacher == 0.25
    assert (found.accuracy, found.original_accuracy) == (0.5, 0.75)
    sure = [torch.softmax(y, 1).amax(1).double().mean() for y in (after, before)]
    assert found.confidence == pytest.approx(float(sure[0] - sure[1]))
    assert [m.inputs for m in found.margins] == [1, 1, 1, 1]
    assert [m.low for m in found.margins] == [1.0, 1.0, 2.0, 3.0]
    assert [m.flips for m in found.margins] == [0.0, 0.0, 1.0, 0.0]
    most = effects(before, {"tiny": after, "max": before})["max"]
    assert (most.flips, most.teacher, most.confidence, most.accuracy, most.ece) == (
        0.0,
        0.0,
        0.0,
        None,
        None,
    )


def test_what_a_true_bound_certifies_never_flips_and_the_rule_is_tight() -> None:
    before = logits(4000, 0)
    sound = Sound("bound", 0.7, 0.7, 0.7, "all", "")
    after = {"max": drifted(before, 0.7 * torch.rand(4000, 1), 1)}
    checked = effects(before, after, sound={"max": sound})["max"].checked
    proven = next(c for c in checked if c.level is None)
    assert proven.flips == 0.0
    assert 0.3 < proven.certified < 1.0
    # the worst step of that size flips what lies just inside
    pair = torch.tensor([[1.0, 0.0]])
    worst = pair + torch.tensor([[-1.0, 1.0]]) / math.sqrt(2) * (1.001 / math.sqrt(2))
    assert effects(pair, {"max": worst})["max"].flips == 1.0


def test_vacuous_bounds_certify_nothing() -> None:
    before = logits(30, 0)
    sound = Sound("vacuous", 9.0, 9.0, 9.0, "all", "larger than the outputs")
    checked = effects(before, {"max": before}, sound={"max": sound})["max"].checked
    assert [c.level for c in checked] == [0.9]


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_of_new_inputs_few_are_certified_and_flip(level: float) -> None:
    rates = []
    for seed in range(60):
        before = 4 * logits(150, seed)
        size = torch.randn(150, 1, generator=torch.Generator().manual_seed(seed + 500)).exp()
        order = before.argsort(1)
        worst = (
            torch.zeros_like(before).scatter(1, order[:, -1:], -1).scatter(1, order[:, -2:-1], 1)
        )
        found = effects(before, {"max": before + size * worst / math.sqrt(2)}, level=level)
        rates.append(found["max"].checked[0].flips)
        assert found["max"].checked[0].certified > 0.1
    error = np.std(rates) / math.sqrt(len(rates))
    assert 0 < np.mean(rates) <= 1 - level + 3 * error


def test_smaller_profiles_certify_no_more_than_larger_ones() -> None:
    before = logits(200, 3)
    after = {"tiny": drifted(before, 0.1, 1), "max": drifted(before, 0.5, 2)}  # not monotone
    found = effects(before, after)
    assert found["tiny"].checked[0].certified == found["max"].checked[0].certified < 1


def test_too_few_inputs_certify_nothing() -> None:
    before = logits(6, 0)
    assert effects(before, {"max": before})["max"].checked == (Checked(0.9, 0.0, 0.0),)


def test_calibration_error_is_that_of_its_bins() -> None:
    sure = np.array([0.95, 0.95, 0.5, 1.0])
    right = np.array([True, False, True, True])
    # bins 14 (.95, .95, 1.0) and 7 (.5)
    assert expected_calibration_error(sure, right) == pytest.approx((abs(2 - 2.9) + 0.5) / 4)
    assert expected_calibration_error(np.ones(3), np.ones(3, bool)) == 0.0


def test_calibration_error_moves_with_confidence_alone() -> None:
    before = logits(300, 5)
    truth = before.argmax(1)
    found = effects(before, {"tiny": 0.2 * before, "max": before}, truth)["tiny"]
    assert found.flips == 0.0
    assert found.confidence < -0.2
    assert found.ece is not None
    assert found.original_ece is not None
    assert found.ece - found.original_ece > 0.2
    assert all(m.ece is not None and m.ece > 0 for m in found.margins[1:])


def test_outputs_that_are_probabilities_are_taken_as_they_are() -> None:
    before = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    after = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    assert effects(before, {"max": after})["max"].confidence == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([0, 1], r"shape \[2\]; give one for each of the 3 inputs"),
        ([0, 1, 5], r"from 0 to 5; whole numbers from 0 to 4 are allowed"),
        ([0, 1, -1], r"from -1 to 1; whole"),
        ([0.0, 1.0, 2.0], r"labels are float64"),
    ],
)
def test_wrong_answers_are_refused(truth: list[float], message: str) -> None:
    z = logits(3, 0)
    with pytest.raises(ValueError, match=message):
        Classes.of(z, {"max": z}).told(truth)


def test_margins_that_are_not_finite_are_refused() -> None:
    z = torch.full((3, 2), math.nan)
    with pytest.raises(CertificateError, match=r"margins .* not finite"):
        effects(z, {"max": z})
