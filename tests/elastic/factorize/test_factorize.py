"""What every factorizer keeps, and what each promises."""

import pytest
import torch
from torch.nn import functional

from t3c.core.errors import T3CError
from t3c.core.registry import resolve
from t3c.elastic.factorize import DEFAULT, FACTORIZATIONS, LOW_RANK
from t3c.elastic.factorize.base import AbstractFactorizer, damped, principal, second_moment
from t3c.elastic.factorize.cp import CP_ALS, CpAls
from t3c.elastic.factorize.eora import EORA
from t3c.elastic.factorize.saes_svd import SAES_SVD, SaesSvd
from t3c.elastic.factorize.shared_input import SHARED_INPUT_SVD
from t3c.elastic.factorize.svd import SVD
from t3c.elastic.factorize.tucker2 import TUCKER2, Tucker2Hosvd
from t3c.elastic.factorize.whitened_svd import KRONECKER_SVD, WHITENED_SVD
from tests.conformance.factorization import FactorizationConformance


@pytest.mark.parametrize("name", FACTORIZATIONS)
def test_registry_resolves_and_names_agree(name: str) -> None:
    found = resolve(FACTORIZATIONS, name, "factorization", T3CError)
    assert isinstance(found, AbstractFactorizer)
    assert found.name == name


class TestSvd(FactorizationConformance):
    factorizer = SVD
    inputs = False


class TestWhitenedSvd(FactorizationConformance):
    factorizer = WHITENED_SVD


class TestKroneckerSvd(FactorizationConformance):
    factorizer = KRONECKER_SVD
    outputs = True


class TestSaesSvd(FactorizationConformance):
    factorizer = SAES_SVD
    outputs = True


class TestSharedInputSvd(FactorizationConformance):
    factorizer = SHARED_INPUT_SVD
    outputs = True


class TestEora(FactorizationConformance):
    factorizer = EORA
    outputs = True


class TestTucker2(FactorizationConformance):
    factorizer = TUCKER2
    convolution = outputs = True


class TestCp(FactorizationConformance):
    factorizer = CP_ALS
    convolution = True
    exact = inputs = False


def test_every_registered_factorizer_is_under_the_suite() -> None:
    tested = {cls.factorizer.name for cls in FactorizationConformance.__subclasses__()}
    assert tested == set(FACTORIZATIONS)


def test_low_ranks_are_made_by_any_of_their_factorizers() -> None:
    for name in LOW_RANK:
        found = resolve(FACTORIZATIONS, name, "factorization", T3CError)
        assert isinstance(found, AbstractFactorizer)
        assert found.factors == ("low", "high")
    assert DEFAULT in LOW_RANK


def test_each_metric_wins_where_it_is_the_measure() -> None:
    draw = torch.Generator().manual_seed(5)
    w = torch.randn(24, 32, generator=draw)
    moment = second_moment(torch.randn(200, 32, generator=draw) * torch.logspace(-2, 1, 32))
    gains = torch.diag(torch.logspace(-2, 2, 24))

    def lost(found: AbstractFactorizer, left: torch.Tensor, right: torch.Tensor) -> float:
        off = found.residual(w, found.split(w, moment, gains=gains), (8,)).double()
        return float(torch.trace(left.double() @ off @ right.double() @ off.T))

    contestants = (SVD, WHITENED_SVD, KRONECKER_SVD)
    metrics = ((torch.eye(24), torch.eye(32)), (torch.eye(24), moment), (gains, moment))
    for best, metric in zip(contestants, metrics, strict=True):
        assert min(contestants, key=lambda f: lost(f, *metric)) is best


def test_svd_is_the_best_low_rank() -> None:
    w = torch.randn(20, 30)
    factors = SVD.split(w)
    for rank in (1, 5, 19):
        got = float(SVD.residual(w, factors, (rank,)).norm())
        want = float(torch.linalg.svdvals(w)[rank:].norm())
        assert got == pytest.approx(want, rel=1e-4)
    norms = factors["low"].norm(dim=1), factors["high"].norm(dim=0)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_whitening_wins_on_the_inputs_it_saw(shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    x = torch.randn(500, shape[1]) * torch.logspace(-2, 1, shape[1])
    moment = second_moment(x)
    plain, white = SVD.split(w), WHITENED_SVD.split(w, moment)
    for rank in (2, 8, 16):
        errors = [float((x @ SVD.residual(w, f, (rank,)).t()).norm()) for f in (plain, white)]
        best = torch.linalg.svdvals(w.double() @ torch.linalg.cholesky(damped(moment, 1e-3)))
        bound = float(best[rank:].norm()) * 500**0.5
        assert errors[1] < errors[0]
        assert errors[1] <= bound * 1.01


def test_compensation_of_no_error_is_the_whitened_or_two_sided_factorizer_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(7)
    w, x = torch.randn(12, 20, generator=draw), torch.randn(90, 20, generator=draw)
    moment, root = second_moment(x), torch.randn(12, 12, generator=draw)
    gains = root @ root.T + 0.03 * torch.eye(12)
    aim = SAES_SVD.aimed(w, moment, moment)
    assert torch.equal(aim, w)
    for twin, weighs in ((WHITENED_SVD, None), (KRONECKER_SVD, gains)):
        one, two = SAES_SVD.split(aim, moment, gains=weighs), twin.split(w, moment, gains=weighs)
        assert all(torch.equal(one[name], two[name]) for name in two)


def test_the_aimed_weight_is_the_damped_least_squares_fit() -> None:
    draw = torch.Generator().manual_seed(8)
    w = torch.randn(6, 9, generator=draw).double()
    x = torch.randn(500, 9, generator=draw).double()
    seen = x + 0.5 * torch.randn(500, 9, generator=draw).double()
    moment, cross = second_moment(seen), x.T @ seen / len(x)
    best = torch.linalg.lstsq(seen, x @ w.T).solution.T
    whole = SaesSvd(share=1.0, ridge=0.0).aimed(w, moment, cross)
    torch.testing.assert_close(whole, best.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(SaesSvd(share=0.0).aimed(w, moment, cross), w.float())
    level = 0.2 * moment.diagonal().mean() * torch.eye(9)
    part = w @ (0.3 * moment + 0.7 * cross + level) @ torch.linalg.inv(moment + level)
    found = SaesSvd(share=0.7, ridge=0.2).aimed(w, moment, cross)
    torch.testing.assert_close(found, part.float(), rtol=1e-4, atol=1e-5)


def test_compensation_refuses_moments_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(3, 3\); this weight needs \[3, 3\]"):
        SAES_SVD.aimed(torch.zeros(4, 3), torch.eye(2), torch.eye(3))
    assert torch.equal(
        SAES_SVD.aimed(torch.ones(4, 3), torch.zeros(3, 3), torch.eye(3)), torch.ones(4, 3)
    )


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (80, 80)])
@pytest.mark.parametrize("decades", [1, 3, 8])  # of the inputs' variances: 8 are beyond float32
@pytest.mark.parametrize("weighed", [False, True])
def test_float32_is_within_a_percent_of_the_optimum(
    shape: tuple[int, int], decades: int, weighed: bool
) -> None:
    torch.manual_seed(decades)
    w, (n, k) = torch.randn(shape), shape
    turn, _ = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))
    moment = turn @ torch.diag(10 ** -torch.linspace(0, decades, k).double()) @ turn.T
    root = torch.randn(n, n, dtype=torch.float64) / n**0.5
    gains = root @ root.T + 0.03 * torch.eye(n) if weighed else None
    metric = damped(moment, WHITENED_SVD.damping)
    left = torch.linalg.cholesky(torch.eye(n).double() if gains is None else gains)
    best = torch.linalg.svdvals(left.T @ w.double() @ torch.linalg.cholesky(metric))
    for rank in (4, 16, 32):
        found = KRONECKER_SVD.split(w, moment.float(), gains=gains, ranks=(rank,))
        off = left.T @ KRONECKER_SVD.residual(w, found, (rank,)).double()
        lost = float(torch.trace(off @ metric @ off.T))
        assert lost <= 1.01 * float(best[rank:].square().sum())
        assert found["low"].shape == (rank, k)


def test_principal_falls_back_to_float64() -> None:
    asked = []

    def gram(dtype: torch.dtype) -> torch.Tensor:
        asked.append(dtype)
        return torch.diag(torch.tensor([1.0, 1e-4, 1e-9], dtype=dtype))

    values, vectors = principal(gram, 2)
    assert asked == [torch.float32]
    assert (values.shape, vectors.shape) == ((2,), (3, 2))
    values, _ = principal(gram, 3)
    assert asked[1:] == [torch.float32, torch.float64]
    assert float(values[2]) == pytest.approx(1e-9, rel=1e-5)


def test_zero_weight_and_zero_moment_stay_finite() -> None:
    for factors in (
        SVD.split(torch.zeros(3, 4)),
        WHITENED_SVD.split(torch.randn(3, 4), torch.zeros(4, 4)),
        WHITENED_SVD.split(torch.zeros(4, 3), torch.eye(3)),
        TUCKER2.split(torch.zeros(3, 4, 3, 3)),
    ):
        assert all(bool(torch.isfinite(f).all()) for f in factors.values())


def test_hooi_is_no_worse_than_hosvd_where_it_refines() -> None:
    w = torch.randn(16, 12, 3, 3)
    plain = Tucker2Hosvd(sweeps=0)
    errors = [float(f.residual(w, f.split(w), (6, 8)).norm()) for f in (plain, TUCKER2)]
    assert errors[1] <= errors[0] * (1 + 1e-6)


def test_hooi_lowers_the_error_in_the_metric_of_the_inputs() -> None:
    draw = torch.Generator().manual_seed(9)
    w = torch.randn(16, 12, 3, 3, generator=draw)
    moment = second_moment(torch.randn(200, 12, generator=draw) * torch.logspace(-1, 1, 12))
    metric = damped(moment, TUCKER2.damping)

    def lost(found: Tucker2Hosvd) -> float:
        off = found.residual(w, found.split(w, moment), (6, 8)).double()
        return float(torch.einsum("oihw,ij,ojhw->", off, metric, off))

    assert lost(TUCKER2) < lost(Tucker2Hosvd(sweeps=0))


@pytest.mark.parametrize("weighed", [False, True])
def test_tucker2_that_knows_the_outputs_has_their_best_basis(weighed: bool) -> None:
    draw = torch.Generator().manual_seed(4)
    w = torch.randn(12, 6, 3, 3, generator=draw)
    x = functional.avg_pool2d(torch.randn(8, 6, 24, 24, generator=draw), 5, 1)  # taps correlate
    rows = functional.conv2d(x, w).movedim(1, -1).reshape(-1, 12)
    outputs, moment = second_moment(rows), second_moment(x.movedim(1, -1))
    root = torch.randn(12, 12, generator=draw)
    gains = root @ root.T / 12 + 0.03 * torch.eye(12) if weighed else None
    left = torch.eye(12) if gains is None else torch.linalg.cholesky(gains)
    best = torch.linalg.eigvalsh(left.T.double() @ outputs @ left.double())
    knows = TUCKER2.split(w, moment, gains=gains, outputs=outputs)
    guesses = TUCKER2.split(w, moment, gains=gains)
    torch.testing.assert_close(TUCKER2.merge(knows), w, rtol=1e-3, atol=1e-3)
    for rank in (2, 5, 8):
        lost = [
            float((functional.conv2d(x, TUCKER2.residual(w, f, (6, rank))).movedim(1, -1) @ left)
            .square().sum(-1).mean())
            for f in (knows, guesses)
        ]  # fmt: skip
        assert lost[0] == pytest.approx(float(best[: 12 - rank].sum()), rel=0.01)
        assert lost[0] < 0.9 * lost[1]


def test_cp_finds_a_planted_decomposition() -> None:
    torch.manual_seed(3)
    modes = [torch.randn(n, 3) for n in (8, 7, 3, 3)]
    w = torch.einsum("or,ir,hr,wr->oihw", *modes)
    factors = CP_ALS.split(w, ranks=(3,))
    assert float(CP_ALS.residual(w, factors, (3,)).norm() / w.norm()) < 1e-2
    assert CP_ALS.merge(factors, (1,)).shape == w.shape


def test_more_starts_of_cp_are_never_worse() -> None:
    w = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    errors = []
    for restarts in (1, 2, 4):
        found = CpAls(restarts=restarts, sweeps=8)
        errors.append(float(found.residual(w, found.split(w, ranks=(4,)), (4,)).norm()))
    assert errors[2] <= errors[1] <= errors[0]
    assert errors[2] < errors[0]


def test_a_start_of_cp_that_diverges_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CpAls.fit
    starts: list[int] = []

    def fit(self: CpAls, w: torch.Tensor, modes: list[torch.Tensor]) -> list[torch.Tensor]:
        starts.append(len(starts))
        return [m * float("nan") for m in modes] if len(starts) == 1 else real(self, w, modes)

    monkeypatch.setattr(CpAls, "fit", fit)
    factors = CpAls(restarts=2, sweeps=2).split(torch.randn(4, 4, 3, 3), ranks=(2,))
    assert starts == [0, 1]
    assert all(bool(torch.isfinite(f).all()) for f in factors.values())


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 1e37])
def test_cp_fits_weights_of_any_scale_alike(scale: float) -> None:
    draw = torch.Generator().manual_seed(6)
    w = torch.randn(6, 5, 3, 3, generator=draw).double()

    def lost(times: float) -> float:
        scaled = (w * times).float()
        factors = CpAls(sweeps=8).split(scaled, ranks=(3,))
        off = CP_ALS.merge({n: f.double() for n, f in factors.items()}) - scaled.double()
        return float(off.norm() / scaled.double().norm())

    assert lost(scale) == pytest.approx(lost(1.0), rel=1e-3)
    assert lost(1.0) < 0.95


def _no_best_rank_two() -> torch.Tensor:
    """Rank 4, but the limit of tensors of rank 2: components that fit it well grow and cancel."""
    spots = ((0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0))
    w = torch.zeros(4, 4, 3, 3)
    for at in spots:
        w[at] = 1.0
    return w


def test_cp_stays_finite_and_useful_where_no_best_fit_exists() -> None:
    w = _no_best_rank_two()
    factors = CP_ALS.split(w, ranks=(2,))
    assert all(bool(torch.isfinite(f).all()) for f in factors.values())
    assert float(CP_ALS.residual(w, factors, (2,)).norm() / w.norm()) < 0.1
    assert max(float(f.abs().max()) for f in factors.values()) < 100


def test_singular_systems_of_cp_are_passed_over_and_refused_when_there_is_nothing_else() -> None:
    w = torch.zeros(4, 4, 3, 3)
    w[0, 0, 0, 0] = 1.0  # of rank 1: with three components the normal equations are singular
    with pytest.raises(T3CError, match=r"CP of rank 3 diverged from 3 starts .*smaller rank"):
        CpAls(ridge=0.0, floor=0.0).split(w, ranks=(3,))
    factors = CP_ALS.split(w, ranks=(3,))
    assert float(CP_ALS.residual(w, factors, (3,)).norm()) < 1e-4


def test_cp_that_diverges_from_every_start_is_refused() -> None:
    with pytest.raises(T3CError, match="diverged from 2 starts"):
        CpAls(restarts=2, sweeps=1, ridge=float("nan")).split(torch.randn(2, 2, 3, 3))


def test_break_even_counts_elements() -> None:
    assert SVD.break_even((768, 768)) == 384
    rank = TUCKER2.break_even((64, 64, 3, 3))
    assert rank * 64 * 2 + rank * rank * 9 == pytest.approx(64 * 64 * 9)
    assert CP_ALS.break_even((64, 64, 3, 3)) == pytest.approx(64 * 64 * 9 / 134)
