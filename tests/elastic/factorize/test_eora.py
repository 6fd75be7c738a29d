"""The repair branch: what it starts from, and what it is the best of."""

import pytest
import torch

from t3c.core.codes import quantize_groups
from t3c.elastic.factorize.base import damped, second_moment
from t3c.elastic.factorize.eora import EORA
from t3c.elastic.rounding import round_groups


def _layer(n: int = 48, k: int = 130) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(n + k)
    w = torch.randn(n, k, generator=draw)
    x = torch.randn(400, k, generator=draw) @ torch.randn(k, k, generator=draw)
    return w, second_moment(x)


def test_rank_zero_is_the_dense_4_bit_weight_bit_for_bit() -> None:
    w, moment = _layer()
    factors = EORA.split(w, moment)
    codes = round_groups(w, moment, search=True)
    assert torch.equal(EORA.merge(factors, (0,)), torch.from_numpy(codes.dequantize()))


def test_codes_that_are_there_are_repaired_as_they_are() -> None:
    w, moment = _layer()
    codes = quantize_groups(w.numpy())
    factors = EORA.repair(w, codes, moment)
    assert torch.equal(factors["base"], torch.from_numpy(codes.dequantize()))
    torch.testing.assert_close(EORA.merge(factors), w, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"codes are \(48, 130\); this weight needs \(48, 129\)"):
        EORA.repair(w[:, :129], codes)


def test_more_ranks_leave_the_base_alone() -> None:
    w, moment = _layer()
    few, many = (EORA.split(w, moment, ranks=(r,)) for r in (4, 32))
    assert torch.equal(few["base"], many["base"])
    assert few["low"].shape == (4, 130)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("shape", [(48, 130), (130, 48)])
def test_the_branch_is_the_best_low_rank_of_what_rounding_lost(
    shape: tuple[int, int], weighed: bool
) -> None:
    w, moment = _layer(*shape)
    root = torch.randn(len(w), len(w), generator=torch.Generator().manual_seed(2))
    gains = root @ root.T / len(w) + 0.03 * torch.eye(len(w)) if weighed else None
    factors = EORA.split(w, moment, gains=gains)
    left = torch.linalg.cholesky(torch.eye(len(w)).double() if gains is None else gains.double())
    # EoRA's own root of the moment: eigenvectors times the roots of the eigenvalues.
    values, vectors = torch.linalg.eigh(damped(moment, EORA.damping))
    right = vectors * values.sqrt()
    lost = left.T @ (w - factors["base"]).double() @ right
    best = torch.linalg.svdvals(lost).square()
    for rank in (1, 8, 24):
        off = left.T @ EORA.residual(w, factors, (rank,)).double() @ right
        assert float(off.square().sum()) == pytest.approx(float(best[rank:].sum()), rel=0.01)


def test_break_even_is_the_bytes_of_dense_int8() -> None:
    assert EORA.break_even((384, 1536)) == 384 * 1536 / 2 / (384 + 1536)
