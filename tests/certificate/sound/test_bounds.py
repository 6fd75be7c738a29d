import pytest
import torch
from torch import Tensor, nn

from t3c.certificate.sound import Ball, Box, Domain, certify, sound_bounds
from t3c.certificate.sound.norms import conv_norm, matrix_norm
from t3c.core.fields import Fields
from t3c.core.formats import Dense, Format, LowRank, Tucker2
from t3c.core.manifest import _sound_from_json, _sound_to_json
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
    return {
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


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("mode", ["interval", "norm", "both", "symbols"])
def test_no_attack_exceeds_the_bound(name: str, mode: str) -> None:
    model, x, formats = nets()[name]
    for domain in (
        Domain.around([(x,)], 0.02),
        Domain.around([(x,)], 0.1, "l2"),
        Domain.box(-torch.ones_like(x), torch.ones_like(x)),
    ):
        found = sound_bounds(model, chain(formats), domain, mode=mode)  # type: ignore[arg-type]
        for i, chosen in enumerate(formats):
            assert attack(model, chosen, domain.cells[0][0]) <= found[f"p{i}"].raw  # type: ignore[arg-type]
        values = [s.value for s in found.values()]
        assert values == sorted(values, reverse=True)


def test_symbols_are_tighter_than_intervals_near_data() -> None:
    for model, x, formats in nets().values():
        domain = Domain.around([(x,)], 0.02)
        loose = sound_bounds(model, chain(formats), domain, mode="interval")["p0"]
        tight = sound_bounds(model, chain(formats), domain)["p0"]
        assert tight.raw < loose.raw / 1.5


def test_operators_without_a_rule_are_named() -> None:
    model = elasticize(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)).eval(), (torch.randn(1, 4),))
    found = certify(
        model, chain([{"0": Dense(8)}]), Domain.box(-torch.ones(1, 4), torch.ones(1, 4))
    )
    sound = next(iter(found)).certificate.sound
    assert sound is not None
    assert sound.status == "unavailable"
    assert "softmax" in sound.reason
    assert _sound_from_json(Fields(_sound_to_json(sound), "f")) == sound


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


def test_domains_refuse_what_they_cannot_state() -> None:
    with pytest.raises(ValueError, match="low <= high"):
        Box(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="finite ends"):
        Box(torch.zeros(2), torch.full((2,), float("inf")))
    with pytest.raises(ValueError, match="radius"):
        Ball(torch.zeros(2), -1.0)
