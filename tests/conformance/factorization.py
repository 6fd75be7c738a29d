"""What every factorizer keeps. Subclass it; give `factorizer`, and what it says of itself."""

import math

import pytest
import torch
from torch import Tensor

from t3c.core.errors import T3CError
from t3c.elastic.factorize.base import AbstractFactorizer, Factors, Ranks, damped, second_moment
from t3c.elastic.factorize.eora import BASE_SHARE

DAMPING = 1e-3


class FactorizationConformance:
    """The promises of AbstractFactorizer.

    Attributes:
        factorizer: The one under test.
        convolution: Whether it takes [out, in, kh, kw].
        exact: Whether its full rank is the weight itself.
        inputs: Whether it weighs errors by the inputs' second moment.
        outputs: Whether it weighs errors by the gains of the outputs.
    """

    factorizer: AbstractFactorizer
    convolution: bool = False
    exact: bool = True
    inputs: bool = True
    outputs: bool = False

    @pytest.fixture(params=[(12, 8), (8, 12), (9, 9), (1, 5), (5, 1)], ids=str)
    def weight(self, request: pytest.FixtureRequest) -> Tensor:
        n, k = request.param
        draw = torch.Generator().manual_seed(n * 31 + k)
        return torch.randn(n, k, *((3, 2) if self.convolution else ()), generator=draw)

    def moment(self, weight: Tensor) -> Tensor:
        k = weight.shape[1]
        draw = torch.Generator().manual_seed(k)
        x = torch.randn(4 * k, k, generator=draw) @ torch.randn(k, k, generator=draw)
        return second_moment(x)

    def gains(self, weight: Tensor) -> Tensor:
        n = len(weight)
        g = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(n))
        return g.T @ g / len(g) + 0.03 * torch.eye(n)

    def path(self, weight: Tensor) -> list[Ranks]:
        """Rising ranks, the last one full."""
        n, k = weight.shape[:2]
        if self.convolution and len(self.factorizer.factors) == 3:
            steps = 4
            return [(math.ceil(k * i / steps), math.ceil(n * i / steps)) for i in (1, 2, 3, 4)]
        return [(r,) for r in sorted({1, 2, min(n, k) // 2, min(n, k)} - {0}) if r <= min(n, k)]

    def split(self, weight: Tensor, ranks: Ranks | None = None) -> Factors:
        return self.factorizer.split(
            weight, self.moment(weight), gains=self.gains(weight), ranks=ranks
        )

    def lost(self, residual: Tensor, weight: Tensor) -> float:
        """Squared error in the factorizer's own metric."""
        off = residual.double().flatten(2) if residual.dim() > 2 else residual.double()[:, :, None]
        left = self.gains(weight).double() if self.outputs else torch.eye(len(weight)).double()
        right = torch.eye(weight.shape[1]).double()
        if self.inputs:
            right = damped(self.moment(weight), DAMPING).double()
        return float(torch.einsum("oit,op,ij,pjt->", off, left, right, off))

    def test_full_rank_is_exact(self, weight: Tensor) -> None:
        if not self.exact:
            pytest.skip("has no exact end")
        for factors in (self.split(weight), self.factorizer.split(weight)):
            merged = self.factorizer.merge(factors)
            torch.testing.assert_close(merged, weight, rtol=1e-4, atol=1e-4)

    def test_rank_k_is_the_first_k_components_bit_for_bit(self, weight: Tensor) -> None:
        factors = self.split(weight)
        for ranks in self.path(weight):
            first = {name: self.cut(name, value, ranks) for name, value in factors.items()}
            assert torch.equal(
                self.factorizer.merge(first), self.factorizer.merge(factors, ranks).contiguous()
            )
            if self.exact:  # asked for at once, they are the same up to float32
                alone = self.factorizer.merge(self.split(weight, ranks))
                torch.testing.assert_close(
                    alone, self.factorizer.merge(first), rtol=1e-3, atol=1e-3
                )

    def test_the_same_split_twice_is_the_same_bits(self, weight: Tensor) -> None:
        one, two = self.split(weight), self.split(weight)
        assert all(torch.equal(one[name], two[name]) for name in one)

    def cut(self, name: str, value: Tensor, ranks: Ranks) -> Tensor:
        """The part of a factor that these ranks read."""
        a, b = ranks[0], ranks[-1]
        match name:
            case "base":
                return value
            case "high" | "cp_out" | "expand":
                return value[:, :b]
            case "core":
                return value[:b, :a]
            case _:
                return value[:a]

    def test_factors_have_their_names_and_are_float32(self, weight: Tensor) -> None:
        for kind in (weight, weight.double()):
            factors = self.split(kind)
            assert tuple(factors) == self.factorizer.factors
            assert {f.dtype for f in factors.values()} == {torch.float32}
            assert all(bool(torch.isfinite(f).all()) for f in factors.values())

    def test_break_even_is_where_the_counted_elements_meet(self, weight: Tensor) -> None:
        rank = self.factorizer.break_even(tuple(weight.shape))
        for r in {math.floor(rank), math.ceil(rank)} - {0}:
            n, k = weight.shape[:2]
            sides = (k, n) if "core" in self.factorizer.factors else (r, r)
            if r > min(sides):
                continue
            torch.manual_seed(0)
            full = self.factorizer.split(weight, ranks=(r, r))
            counted = sum(
                self.cut(name, f, (r, r)).numel() * (BASE_SHARE if name == "base" else 1)
                for name, f in full.items()
            )
            reach = min(
                f.shape[0] for name, f in full.items() if name in ("low", "reduce", "cp_in")
            )
            if reach < r:
                continue  # more components than the matrix has
            assert (counted <= weight.numel()) == (r <= rank), (r, rank)

    def test_the_error_never_rises_with_the_rank(self, weight: Tensor) -> None:
        factors = self.split(weight)
        errors = []
        for ranks in self.path(weight):
            used = factors if self.exact else self.split(weight, ranks)
            errors.append(self.lost(self.factorizer.residual(weight, used, ranks), weight))
        whole = self.lost(weight, weight)
        slack = 1e-6 * whole
        assert all(b <= a + slack for a, b in zip([whole, *errors], errors, strict=False))

    def test_values_that_are_not_finite_are_refused_by_name(self) -> None:
        weight = torch.randn(4, 3, *((3, 3) if self.convolution else ()))
        for bad in (math.nan, math.inf):
            broken = weight.clone()
            broken.view(-1)[1] = bad
            with pytest.raises(T3CError, match="the weight hold NaN or infinity"):
                self.factorizer.split(broken)
            with pytest.raises(T3CError, match="the second moment of the inputs hold NaN"):
                self.factorizer.split(weight, torch.full((3, 3), bad))
            with pytest.raises(T3CError, match="the gains of the outputs hold NaN"):
                self.factorizer.split(weight, torch.eye(3), gains=torch.full((4, 4), bad))
            with pytest.raises(T3CError, match="second moment of the outputs hold NaN"):
                self.factorizer.split(weight, torch.eye(3), outputs=torch.full((4, 4), bad))

    def test_metrics_of_another_shape_are_refused(self) -> None:
        weight = torch.randn(4, 3, *((3, 3) if self.convolution else ()))
        with pytest.raises(ValueError, match=r"second moment .* needs \[3, 3\]"):
            self.factorizer.split(weight, torch.eye(4))
        with pytest.raises(ValueError, match=r"gains .* needs \[4, 4\]"):
            self.factorizer.split(weight, torch.eye(3), gains=torch.eye(3))
        with pytest.raises(ValueError, match=r"moment of the outputs .* needs \[4, 4\]"):
            self.factorizer.split(weight, torch.eye(3), outputs=torch.eye(3))
        with pytest.raises(ValueError, match="a rank is at least 1"):
            self.factorizer.split(weight, ranks=(0, 1))

    def test_a_dead_layer_stays_finite(self) -> None:
        shape = (4, 3, *((3, 3) if self.convolution else ()))
        for weight, moment in (
            (torch.zeros(shape), torch.eye(3)),
            (torch.randn(shape), torch.zeros(3, 3)),
        ):
            factors = self.factorizer.split(weight, moment)
            assert all(bool(torch.isfinite(f).all()) for f in factors.values())
