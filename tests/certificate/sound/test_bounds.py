import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from t3c.certificate.sound import Ball, Box, Domain, certify, sound_bounds
from t3c.certificate.sound.form import MODES, Form, Mode, NoRule, Space, constant
from t3c.certificate.sound.norms import conv_norm, largest_norm, matrix_norm
from t3c.certificate.sound.pair import Pair, curve, gamma
from t3c.certificate.sound.propagate import averaged, spread
from t3c.certificate.sound.slopes import CURVES
from t3c.core.certificate_json import sound_from_json, sound_to_json
from t3c.core.codes import Correction
from t3c.core.errors import CertificateError
from t3c.core.fields import Fields
from t3c.core.formats import Dense, Format, LowRank, Tucker2
from t3c.core.profile import Profile, ProfileChain
from t3c.elastic.model import ElasticModel
from tests.front import elasticize


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.l = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.a(x)), 2)
        x = torch.relu(self.b(x))
        y: Tensor = self.l(torch.relu(x + self.c(x)).mean((2, 3)))
        return y


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(8), nn.RMSNorm(8)
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)
        self.a, self.b, self.l = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before(x)).chunk(3, -1)
        q, k, v = (p.view(1, 3, 2, 4).transpose(1, 2) for p in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).reshape(1, 3, 8))
        x = x + self.b(nn.functional.gelu(self.a(self.after(x)), approximate="tanh"))
        y: Tensor = self.l(x.mean(1))
        return y


@functools.cache
def nets() -> dict[str, tuple[ElasticModel, Tensor, list[dict[str, Format]]]]:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)
    ).eval()
    x, image = torch.randn(1, 12), torch.randn(1, 1, 8, 8)
    conv = elasticize(Conv().eval(), (image,))
    eight: dict[str, Format] = {"a": Dense(8), "b": Dense(8), "c": Dense(8), "l": Dense(8)}
    low: list[dict[str, Format]] = [
        {"0": Dense(8), "2": LowRank(4), "4": Dense(8)},
        {"0": Dense(8), "2": LowRank(8), "4": Dense(8)},
        {"0": Dense(8), "2": Dense(8), "4": Dense(8)},
    ]
    rows = torch.randn(1, 3, 8)
    mixing = elasticize(Transformer().eval(), (rows,))
    all8: dict[str, Format] = {name: Dense(8) for name in mixing.sites}
    return {
        "attention": (mixing, rows, [{**all8, "qkv": LowRank(4), "a": LowRank(4)}, all8]),
        "mlp": (elasticize(dense, (x,)), x, low),
        "conv": (conv, image, [{**eight, "c": Tucker2(4, 4)}, eight]),
    }


def chain(formats: list[dict[str, Format]]) -> ProfileChain:
    return ProfileChain(tuple(Profile(f"p{i}", f, 1, 1, 1) for i, f in enumerate(formats)))


def attack(model: ElasticModel, formats: dict[str, Format], region: Box | Ball) -> float:
    """Largest drift that random corners and projected gradients find."""
    worst = 0.0
    for start in range(12):
        if isinstance(region, Box):
            low, high = region.low, region.high
            x = low + (high - low) * torch.rand_like(low).round()
            step = (high - low) / 8
        else:
            turn = torch.randn_like(region.center)
            x = region.center + region.radius * turn / turn.norm()
            step = torch.full_like(x, region.radius / 8)
        for _ in range(10 if start % 2 else 1):
            x = x.detach().requires_grad_()
            before = model.graph(x)[0]
            with model.using(formats):
                drift = (model.graph(x)[0] - before).norm()
            worst = max(worst, float(drift.detach()))
            (slope,) = torch.autograd.grad(drift, x)
            x = x.detach() + step * slope.sign()
            if isinstance(region, Box):
                x = torch.minimum(torch.maximum(x, region.low), region.high)
            else:
                away = x - region.center
                x = region.center + away * min(1.0, region.radius / float(away.norm()))
    return worst


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in ("mlp", "conv") for mode in MODES),
        ("attention", "interval"),
        ("attention", "symbols"),
    ],
)
def test_no_attack_exceeds_the_bound(name: str, mode: Mode) -> None:
    model, x, formats = nets()[name]
    for domain in (
        Domain.around([(x,)], 0.02),
        Domain.around([(x,)], 0.1, "l2"),
        Domain.box(-torch.ones_like(x), torch.ones_like(x)),
    ):
        found = sound_bounds(model, chain(formats), domain, mode=mode)
        for i, chosen in enumerate(formats):
            assert attack(model, chosen, domain.cells[0][0]) <= found[f"p{i}"].raw
            assert found[f"p{i}"].raw < math.inf
        values = [s.value for s in found.values()]
        assert values == sorted(values, reverse=True)


def test_symbols_are_tighter_than_intervals_near_data() -> None:
    for model, x, formats in nets().values():
        domain = Domain.around([(x,)], 0.02)
        loose = sound_bounds(model, chain(formats), domain, mode="interval")["p0"]
        tight = sound_bounds(model, chain(formats), domain)["p0"]
        assert tight.raw < loose.raw / 1.5


def test_operators_without_a_rule_are_named() -> None:
    model = elasticize(nn.Sequential(nn.Linear(4, 4), nn.Softmax(0)).eval(), (torch.randn(1, 4),))
    found = certify(
        model, chain([{"0": Dense(8)}]), Domain.box(-torch.ones(1, 4), torch.ones(1, 4))
    )
    sound = next(iter(found)).certificate.sound
    assert sound is not None
    assert sound.status == "unavailable"
    assert "softmax" in sound.reason
    assert sound_from_json(Fields(sound_to_json(sound), "f")) == sound


def test_norm_bounds_are_above_the_norms_of_explicit_matrices() -> None:
    torch.manual_seed(1)
    for stride, dilation in (((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2))):
        w = torch.randn(3, 2, 3, 3, dtype=torch.float64)
        basis = torch.eye(2 * 36, dtype=torch.float64).reshape(-1, 2, 6, 6)
        y = nn.functional.conv2d(basis, w, None, stride, (1, 1), dilation)
        exact = float(torch.linalg.matrix_norm(y.flatten(1), 2))
        assert exact <= conv_norm(w, (6, 6), (1, 1), dilation) <= 3 * exact
    m = torch.randn(5, 9)
    exact = float(torch.linalg.matrix_norm(m.double(), 2))
    assert exact <= matrix_norm(m) <= exact * 1.0001


class Spelled(nn.Module):
    """Attention, a norm and a gate in single operators."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.a, self.b, self.l = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-4))
        shares = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 2, -1)
        y = shares @ self.v(x) - x
        y = nn.functional.silu(self.a(y)) * self.b(y)
        z: Tensor = self.l(torch.erf(y)).mean(1)
        return z


def test_operators_in_single_steps_have_rules_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 6)
    model = elasticize(Spelled().eval(), (x,))
    fmts: dict[str, Format] = {name: Dense(8) for name in model.sites}
    fmts |= {"q": LowRank(3), "a": LowRank(3)}
    domain = Domain.around([(x,)], 0.05)
    found = sound_bounds(model, chain([fmts]), domain)["p0"]
    assert attack(model, fmts, domain.cells[0][0]) <= found.raw < 3


class Shares(nn.Module):
    """A softmax whose weights average itself, as one tensor or as a copy."""

    def __init__(self, copy: bool) -> None:
        super().__init__()
        self.copy = copy

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(x, -1)
        return shares @ (shares.transpose(1, 2).transpose(1, 2) if self.copy else shares)


def ends(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the only output's float32 value at one input."""
    pairs, _ = spread(elasticize(net.eval(), (x,)), (Box(x, x),), "interval", 100)
    return pairs[0].x.ends


def test_shares_that_average_themselves_are_rounded_on_both_sides() -> None:
    x = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(0))
    one, two = (ends(Shares(copy), x) for copy in (False, True))
    assert torch.equal(one[1] - one[0], two[1] - two[0])


@pytest.mark.parametrize("vectors", [(True, False), (False, True), (True, True)])
def test_products_with_vectors_have_no_rule(vectors: tuple[bool, bool]) -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = (x[0] if vector else x for vector in vectors)
            return torch.as_tensor(a @ b)

    with pytest.raises(NoRule, match="a product with a vector"):
        ends(Product(), torch.ones(3, 3))


def test_constants_are_added_as_float32_has_them() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1

    x = -torch.full((1, 2), 0.1)
    low, high = ends(Shifted(), x)
    assert bool(((low <= x + 0.1) & (x + 0.1 <= high)).all())


def test_symbols_of_the_difference_are_in_no_ball() -> None:
    space = Space(ball=2, values=2)
    zero = torch.zeros(2, dtype=torch.float64)
    none, ones = zero.new_zeros(0, 2), torch.ones(2, 2, dtype=torch.float64)
    form = Form(space, zero, none, ones, zero, 0.0)
    assert form.norm >= 8**0.5 * (1 - 1e-9)
    assert largest_norm(form) >= 8**0.5 * (1 - 1e-9)


@pytest.mark.parametrize("name", sorted(CURVES))
def test_smooth_margins_cover_float32_where_it_cancels(name: str) -> None:
    x = torch.linspace(-9, 9, 4001)
    space = Space("interval")
    zero = constant(space, torch.zeros(4001))
    made = curve(Pair(constant(space, x), zero), CURVES[name]).x
    float32: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": nn.functional.gelu,
        "gelu-tanh": lambda t: nn.functional.gelu(t, approximate="tanh"),
        "erf": torch.erf,
        "silu": nn.functional.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    y = float32[name](x).double()
    assert bool(((made.low <= y) & (y <= made.high)).all())
    exact = CURVES[name].f(x.double())
    assert bool(((y - exact).abs() <= gamma(16) * (1 + x.double().abs())).all())


@pytest.mark.parametrize("name", sorted(CURVES))
def test_secants_lie_within_their_range(name: str) -> None:
    torch.manual_seed(0)
    f = CURVES[name]
    x, d = 3 * torch.randn(2000, dtype=torch.float64), torch.randn(2000, dtype=torch.float64)
    d[::2] *= 1e-3  # short ones have another formula
    wide = torch.rand(2, 2000, dtype=torch.float64) * torch.tensor([0.3, 1e-6]).repeat(1000)
    low, high = f.secants((x - wide[0], x + wide[0]), (d - wide[1], d + wide[1]))
    for sign in (-1, 0, 1):
        at, step = x + sign * wide[0], d + sign * wide[1]
        slope = (f.f(at + step) - f.f(at)) / step
        known = step.abs() > 1e-6  # shorter ones are lost in the quotient
        assert bool(((low <= slope) & (slope <= high))[known].all())


def test_the_window_of_an_average_counts_all_its_terms() -> None:
    aten = torch.ops.aten
    shape = torch.Size((1, 2, 7, 7))
    assert averaged(aten.avg_pool2d.default, (None, [3], 1), shape) == 9
    assert averaged(aten.mean.dim, (None, [2, 3]), shape) == 49
    assert averaged(aten.adaptive_avg_pool2d.default, (None, [4, 4]), shape) >= 9


def test_a_factor_that_broadcasts_its_value_has_no_rule() -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 3)
            self.register_buffer("by", torch.ones(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.l(x) * self.by
            return y

    x = torch.ones(1, 3)
    found = sound_bounds(
        elasticize(Grown().eval(), (x,)), chain([{"l": Dense(8)}]), Domain.box(-x, x)
    )["p0"]
    assert found.status == "unavailable"
    assert "larger than its value" in found.reason


def test_boxes_around_data_reach_beyond_rounded_ends() -> None:
    x = torch.full((1, 2), 1.0)
    box = Domain.around([(x,)], 1e-8).cells[0][0]
    assert isinstance(box, Box)
    assert bool((box.low.double() <= x.double() - 1e-8).all())
    assert bool((box.high.double() >= x.double() + 1e-8).all())


def test_without_a_mode_each_cell_has_the_least_of_all() -> None:
    model, x, formats = nets()["mlp"]
    domain = Domain.box(-torch.ones_like(x), torch.ones_like(x))
    each = [sound_bounds(model, chain(formats), domain, mode=mode) for mode in MODES]
    best = sound_bounds(model, chain(formats), domain)
    assert best["p0"].raw == min(found["p0"].raw for found in each)


def test_a_bound_as_large_as_the_range_of_the_logits_is_vacuous() -> None:
    torch.manual_seed(0)
    x = torch.zeros(1, 4)
    model = elasticize(nn.Sequential(nn.Linear(4, 2)).eval(), (x,))
    lines = chain([{"0": LowRank(1)}, {"0": Dense(8)}])
    wide = sound_bounds(model, lines, Domain.box(x - 1, x + 1))
    assert wide["p1"].status == "bound"
    corner = Domain.box(x, x)
    found = sound_bounds(model, lines, corner)
    assert found["p0"].status == "vacuous"
    assert "extent" in found["p0"].reason
    apart = Domain.around([(x - 1,), (x + 1,)], 1e-3)  # what counts is the range over all cells
    assert sound_bounds(model, lines, apart)["p1"].status == "bound"


def test_domains_refuse_what_they_cannot_state() -> None:
    with pytest.raises(ValueError, match="low <= high"):
        Box(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="finite ends"):
        Box(torch.zeros(2), torch.full((2,), float("inf")))
    with pytest.raises(ValueError, match="one shape and dtype"):
        Box(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="radius"):
        Ball(torch.zeros(2), -1.0)
    x = torch.zeros(1, 2)
    for bad in (-1.0, math.nan, math.inf):
        for norm in ("max", "l2"):
            with pytest.raises(ValueError, match=f"radius is {bad}"):
                Domain.around([(x,)], bad, norm)
        with pytest.raises(ValueError, match=f"margin is {bad}"):
            Domain.of_data([(x,)], bad)
    with pytest.raises(ValueError, match="finite ends; clip the data"):
        Domain.of_data([(x,), (x * math.nan,)])
    with pytest.raises(ValueError, match="needs one shape"):
        Domain.of_data([(x,), (torch.zeros(2, 2),)])


def test_corrected_statistics_are_refused_not_ignored() -> None:
    model, image, profiles = nets()["conv"]
    ones = np.ones(8, np.float32)
    model.set_corrections(profiles[0], {"c": Correction(2 * ones, ones)})
    with pytest.raises(CertificateError, match="profile 'p0' has corrected means and variances"):
        sound_bounds(model, chain(profiles), Domain.around([(image,)], 0.01))
    model.forget_corrections()
    assert sound_bounds(model, chain(profiles), Domain.around([(image,)], 0.01))
