"""Rounding with error feedback: less error in the metric of the inputs, plain where C = I."""

import numpy as np
import pytest
import torch
from torch import Tensor

from t3c.core.codes import RATIO, Grouped, Matrix, Nested, quantize_groups, quantize_weight
from t3c.elastic.rounding import round_groups, round_nested, round_rows


def layer(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """A weight and the moment of inputs that correlate."""
    draw = torch.Generator().manual_seed(rows + cols)
    mixed = torch.randn(cols, cols, generator=draw) / cols**0.5
    x = torch.randn(4 * cols, cols, generator=draw) @ (mixed + 0.3 * torch.eye(cols))
    return torch.randn(rows, cols, generator=draw), x.T @ x / len(x)


def loss(weight: Tensor, made: Matrix | Grouped, moment: Tensor) -> float:
    off = weight - torch.from_numpy(made.dequantize())
    return float(torch.einsum("ij,jk,ik->", off, moment, off))


@pytest.mark.parametrize(("rows", "cols"), [(16, 63), (8, 64), (24, 65), (32, 200)])
def test_feedback_beats_plain_rounding(rows: int, cols: int) -> None:
    weight, moment = layer(rows, cols)
    eight = loss(weight, quantize_weight(weight.numpy()), moment)
    assert loss(weight, round_rows(weight, moment), moment) < 0.8 * eight
    four = loss(weight, quantize_groups(weight.numpy()), moment)
    assert loss(weight, round_groups(weight, moment), moment) < 0.8 * four


def test_inputs_that_do_not_correlate_give_plain_rounding() -> None:
    weight, _ = layer(16, 130)
    moment = torch.eye(130)
    plain = quantize_weight(weight.numpy())
    fed = round_rows(weight, moment)
    np.testing.assert_array_equal(fed.q, plain.q)
    np.testing.assert_array_equal(fed.scale, plain.scale)
    groups = quantize_groups(weight.numpy())
    np.testing.assert_array_equal(round_groups(weight, moment).scale, groups.scale)


@pytest.mark.parametrize(("rows", "cols"), [(16, 63), (8, 64), (24, 65), (32, 200)])
def test_one_array_serves_both_widths_nearly_as_well_as_two(rows: int, cols: int) -> None:
    weight, moment = layer(rows, cols)
    nested = round_nested(weight, moment)
    four = loss(weight, round_groups(weight, moment), moment)
    assert loss(weight, nested.coarse, moment) < 1.25 * four  # squares
    eight = loss(weight, quantize_weight(weight.numpy()), moment)
    assert loss(weight, nested.whole, moment) < 2.5 * eight  # 4 would be a bit less
    np.testing.assert_array_equal(nested.coarse.scale, RATIO * nested.whole.scale)
    again = Nested.of(nested.whole, nested.coarse)
    np.testing.assert_array_equal(again.fine, nested.fine)
    first = round_nested(weight[:5], moment)
    np.testing.assert_array_equal(first.fine, nested.fine[:5])


def test_codes_that_do_not_nest_are_refused() -> None:
    weight, moment = layer(8, 70)
    nested = round_nested(weight, moment)
    other = round_groups(-weight, moment)
    with pytest.raises(ValueError, match=r"differ by RATIO|codes reach from"):
        Nested.of(nested.whole, other)
    with pytest.raises(ValueError, match="allowed are -8 to 7"):
        Nested(nested.coarse, np.full_like(nested.fine, 9))
    with pytest.raises(ValueError, match="fine codes are"):
        Nested(nested.coarse, nested.fine[:3])


def test_every_row_is_rounded_by_itself() -> None:
    weight, moment = layer(32, 96)
    all_rows, first = round_rows(weight, moment), round_rows(weight[:8], moment)
    np.testing.assert_array_equal(all_rows.q[:8], first.q)
    np.testing.assert_array_equal(
        round_groups(weight, moment).q[:8], round_groups(weight[:8], moment).q
    )


def test_inputs_that_were_never_seen() -> None:
    weight, _ = layer(4, 70)
    assert np.isfinite(round_rows(weight, torch.zeros(70, 70)).dequantize()).all()
    zero = torch.zeros(4, 70)
    assert not round_groups(zero, torch.eye(70)).dequantize().any()


def test_a_moment_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"moment is \(3, 3\); need \[70, 70\]"):
        round_rows(torch.zeros(4, 70), torch.eye(3))
