"""One input factor for several layers."""

import pytest
import torch

from t3c.core.errors import T3CError
from t3c.elastic.factorize.base import damped, second_moment
from t3c.elastic.factorize.shared_input import SHARED_INPUT_SVD, SharedInputSvd
from t3c.elastic.factorize.whitened_svd import KRONECKER_SVD


def _layers() -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(n, 20, generator=draw) for n in (10, 12, 7)]
    moment = second_moment(torch.randn(90, 20, generator=draw) * torch.logspace(-1, 1, 20))
    roots = [torch.randn(n, n, generator=draw) for n in (10, 12, 7)]
    return weights, moment, [r @ r.T / len(r) for r in roots]


def test_layers_share_one_tensor_and_are_whole_at_full_rank() -> None:
    weights, moment, gains = _layers()
    for made in (
        SHARED_INPUT_SVD.together(weights),
        SHARED_INPUT_SVD.together(weights, moment),
        SHARED_INPUT_SVD.together(weights, moment, gains=gains),
    ):
        assert all(factors["low"] is made[0]["low"] for factors in made)
        assert made[0]["low"].shape == (20, 20)
        for weight, factors in zip(weights, made, strict=True):
            merged = SHARED_INPUT_SVD.merge(factors)
            torch.testing.assert_close(merged, weight, rtol=1e-4, atol=1e-4)


def test_rank_k_is_the_first_k_components() -> None:
    weights, moment, gains = _layers()
    whole = SHARED_INPUT_SVD.together(weights, moment, gains=gains)
    for rank in (1, 5, 12):
        alone = SHARED_INPUT_SVD.together(weights, moment, gains=gains, ranks=(rank,))
        for one, all_ in zip(alone, whole, strict=True):
            assert one["low"].shape == (rank, 20)
            torch.testing.assert_close(
                SHARED_INPUT_SVD.merge(one), SHARED_INPUT_SVD.merge(all_, (rank,)),
                rtol=1e-3, atol=1e-3,
            )  # fmt: skip


def test_the_shared_factor_loses_least_over_all_layers_together() -> None:
    weights, moment, gains = _layers()
    damping = SHARED_INPUT_SVD.gains_damping
    metric = torch.zeros(29, 29).double()
    for at, part in zip((0, 10, 22), gains, strict=True):
        metric[at : at + len(part), at : at + len(part)] = damped(part, damping)
    left = torch.linalg.cholesky(metric)
    right = torch.linalg.cholesky(damped(moment, SHARED_INPUT_SVD.damping))
    best = torch.linalg.svdvals(left.T @ torch.cat(weights).double() @ right).square()
    made = SHARED_INPUT_SVD.together(weights, moment, gains=gains)
    for rank in (2, 6, 15):
        rest = [
            SHARED_INPUT_SVD.residual(w, f, (rank,)) for w, f in zip(weights, made, strict=True)
        ]
        off = left.T @ torch.cat(rest).double() @ right
        assert float(off.square().sum()) == pytest.approx(float(best[rank:].sum()), rel=0.01)


def test_a_layer_whose_gradients_are_larger_is_kept_better() -> None:
    weights, moment, gains = _layers()
    lost = []
    for times in (1.0, 100.0):
        scaled = [gains[0] * times, *gains[1:]]
        factors = SHARED_INPUT_SVD.together(weights, moment, gains=scaled)[0]
        off = SHARED_INPUT_SVD.residual(weights[0], factors, (6,)).double()
        metric = gains[0].double(), moment.double()
        lost.append(float(torch.einsum("oi,op,ij,pj->", off, *metric, off)))
    assert lost[1] < 0.5 * lost[0]


def test_the_stack_by_itself_is_the_two_sided_factorizer() -> None:
    weights, moment, _ = _layers()
    one = SHARED_INPUT_SVD.split(torch.cat(weights), moment)
    two = KRONECKER_SVD.split(torch.cat(weights), moment)
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_what_cannot_share_is_refused_by_name() -> None:
    weights, moment, gains = _layers()
    with pytest.raises(ValueError, match="1 layer has nothing to share; give at least two"):
        SHARED_INPUT_SVD.together(weights[:1])
    with pytest.raises(ValueError, match=r"\[20, 19\] wide; a shared factor needs layers"):
        SHARED_INPUT_SVD.together([weights[0], weights[1][:, :19]])
    with pytest.raises(ValueError, match="2 gains for 3 layers; give one for each"):
        SHARED_INPUT_SVD.together(weights, moment, gains=gains[:2])
    with pytest.raises(ValueError, match=r"gains of the outputs .* needs \[29, 29\]"):
        SHARED_INPUT_SVD.together(weights, moment, gains=[*gains[:2], torch.eye(3)])
    with pytest.raises(T3CError, match="the weight hold NaN"):
        SHARED_INPUT_SVD.together([weights[0], weights[1] * float("nan")])


def test_damping_of_gains_keeps_layers_without_gradients_finite() -> None:
    weights, moment, gains = _layers()
    for damping in (0.03, 0.5):
        found = SharedInputSvd(gains_damping=damping)
        made = found.together(weights, moment, gains=[torch.zeros(10, 10), *gains[1:]])
        assert all(bool(f.isfinite().all()) for factors in made for f in factors.values())
