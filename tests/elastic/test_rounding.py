"""Rounding with error feedback: less error in the metric of the inputs, plain where C = I."""

import numpy as np
import pytest
import torch
from torch import Tensor

from t3c.core.codes import RATIO, Grouped, Matrix, Nested, quantize_groups, quantize_weight
from t3c.elastic.rounding import CLIPS, clipped, round_groups, round_nested, round_rows


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


@pytest.mark.parametrize(("rows", "cols"), [(16, 63), (24, 65), (32, 200)])
def test_searched_clipping_loses_less(rows: int, cols: int) -> None:
    weight, moment = layer(rows, cols)
    sizes = torch.logspace(-1, 1, cols)[
        torch.randperm(cols, generator=torch.Generator().manual_seed(0))
    ]
    moment = moment * torch.outer(sizes, sizes)  # columns whose errors cost unlike
    plain = loss(weight, round_groups(weight, moment), moment)
    assert loss(weight, round_groups(weight, moment, search=True), moment) < 0.9 * plain


def test_clipping_weighs_columns_by_what_their_errors_cost() -> None:
    group = torch.cat((torch.full((1, 1), 8.0), torch.linspace(-3, 3, 63)[None]), 1)
    even, rare = torch.ones(64), torch.ones(64)
    rare[0] = 100.0  # errors of the outlier cost nothing
    assert float(clipped(group, rare)[0].abs()) < float(clipped(group, even)[0].abs())
    for least in (-2, -4, -8):
        scale = clipped(group, even, least)
        assert torch.equal(scale, scale.bfloat16().float())
        ends = [8 * share / -least for share in (CLIPS[0], CLIPS[-1])]
        assert ends[1] * 0.99 <= float(scale.abs()) <= ends[0] * 1.01
    assert torch.equal(clipped(torch.zeros(2, 5), torch.ones(5)), torch.ones(2))


def test_searched_rows_are_rounded_by_themselves_and_twice_alike() -> None:
    weight, moment = layer(32, 96)
    one, two = (round_groups(weight, moment, search=True) for _ in range(2))
    part = round_groups(weight[:8], moment, search=True)
    np.testing.assert_array_equal(one.q, two.q)
    np.testing.assert_array_equal(one.q[:8], part.q)
    np.testing.assert_array_equal(one.scale[:8], part.scale)


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_than_four_bits_need_a_word_and_warn(bits: int) -> None:
    weight, moment = layer(8, 70)
    with pytest.raises(ValueError, match=rf"bits is {bits}: below 4 bits .* below_four=True"):
        round_groups(weight, moment, bits=bits)
    with pytest.warns(UserWarning, match=f"{bits}-bit codes are stored in 4 bits"):
        made = round_groups(weight, moment, bits=bits, below_four=True)
    assert made.q.min() >= -(1 << (bits - 1))
    assert made.q.max() < 1 << (bits - 1)
    four = loss(weight, round_groups(weight, moment), moment)
    assert loss(weight, made, moment) > 2 * four


def test_other_widths_of_groups_are_refused() -> None:
    weight, moment = layer(2, 64)
    with pytest.raises(ValueError, match="bits is 8; groups have 4, or 2 or 3"):
        round_groups(weight, moment, bits=8, below_four=True)
