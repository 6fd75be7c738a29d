"""The proxy: the paper's formula by hand, rounding as a term of its own, monotone on chains."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from t3c.certificate.gains import gains
from t3c.certificate.proxy import Damage, Meter, proxies, with_proxies
from t3c.core.certificate import MEASURED, PAPER
from t3c.core.errors import CertificateError
from t3c.core.formats import Dense, Format, LowRank
from t3c.core.profile import Profile, ProfileChain
from t3c.elastic.model import ElasticModel
from tests.controller.models import block, cnn, elastic, linear, mlp, more

JACOBIAN: Callable[..., Tensor] = vars(torch.autograd.functional)["jacobian"]


class Two(nn.Module):
    """Two linear layers and nothing else: every Jacobian is a product of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear("first", 48, 64, 8)
        self.second = linear("second", 32, 48, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.second(self.first(x)),)


def two() -> ElasticModel:
    torch.manual_seed(0)
    return elastic(Two(), torch.randn(8, 64))


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


def chain(*plans: Mapping[str, Format]) -> ProfileChain:
    return ProfileChain(
        tuple(Profile(f"p{i}", dict(plan), 1, 1, 1) for i, plan in enumerate(plans))
    )


def test_where_no_layer_is_elastic_nothing_drifts() -> None:
    model = elastic(nn.Sequential(nn.ReLU()), torch.randn(8, 4))
    found = Meter(model, more(model, 2)).against({})
    assert set(found.totals.values()) == {(0.0, 0.0)}
    assert PAPER in found.totals


def test_the_papers_form_equals_the_hand_calculation() -> None:
    model = two()
    formats: dict[str, Format] = {"first": LowRank(16, 32), "second": LowRank(8, 32)}
    batches = more(model, 3)
    found = Meter(model, batches).against(formats)
    first, second = (model.layers[n] for n in formats)
    cut = {
        n: layer.factor("high")[:, :r] @ layer.factor("low")[:r]
        for n, layer, r in (("first", first, 16), ("second", second, 8))
    }
    inputs = torch.cat([b[0] for b in batches])
    assert first.bias is not None
    middle = inputs @ cut["first"].T + first.bias  # the compressed prefix
    hand = norm(second.weight) * norm(cut["first"] - first.weight) * _rms(inputs)
    hand += norm(cut["second"] - second.weight) * _rms(middle)
    assert found.totals[PAPER][0] == pytest.approx(hand, rel=0.03)  # gains settle from below
    assert found.shares["second"].gain == pytest.approx(1.0, rel=1e-4)
    assert found.shares["second"].alpha == pytest.approx(_rms(middle), rel=1e-4)
    assert found.totals[PAPER][0] >= found.totals["jacobian-rms"][0]


def _rms(rows: Tensor) -> float:
    return float(rows.detach().square().sum(1).mean().sqrt())


def test_the_sharper_forms_are_the_drift_where_one_linear_layer_changes() -> None:
    model = two()
    formats: dict[str, Format] = {"first": Dense(32), "second": LowRank(8, 32)}
    batches = more(model, 3)
    found = Meter(model, batches).against(formats)
    with torch.no_grad():
        before = torch.cat([model(*b)[0] for b in batches])
        with model.using(formats):
            after = torch.cat([model(*b)[0] for b in batches])
    assert found.totals["jacobian-rms"][0] == pytest.approx(_rms(after - before), rel=1e-3)
    # gradients of 4 random projections of 24 inputs stand for the identity
    assert found.totals["kronecker"][0] == pytest.approx(_rms(after - before), rel=0.25)


def test_gains_are_norms_of_explicit_jacobians() -> None:
    model = mlp(batch=2)
    found = gains(model, more(model, 2))
    want = []
    for batch in more(model, 2):
        for x in batch[0]:

            def behind(y: Tensor, x: Tensor = x) -> Tensor:
                z = functional.relu(y) + x
                for name in ("fc1", "fc2"):
                    z = functional.relu(model.layers[name](z)) + z
                out: Tensor = model.layers["head"](z)
                return out

            y = model.layers["fc0"](x)
            want.append(norm(JACOBIAN(behind, y.detach())))
    assert found.norm["fc0"] == pytest.approx(sum(want) / len(want), rel=0.05)
    assert found.norm["fc0"] <= sum(want) / len(want) * (1 + 1e-4)
    assert found.norm["head"] == pytest.approx(1.0, rel=1e-4)


def test_gains_that_there_was_no_time_for_lie_between_their_neighbours() -> None:
    model = mlp()
    full, cut = gains(model, more(model, 1)), gains(model, more(model, 1), seconds=0.0)
    assert full.measured == {"fc0", "fc1", "fc2", "head"}
    assert cut.measured == {"fc0"}
    assert set(cut.norm.values()) == {full.norm["fc0"]}


def test_known_gains_are_not_computed_again() -> None:
    model = mlp()
    batches = more(model, 1)
    formats: dict[str, Format] = dict.fromkeys(model.sites, Dense(8))
    first = Meter(model, batches)
    again = Meter(model, batches, seconds=0.0, known=first.gains)
    assert again.gains is first.gains
    assert again.against(formats).totals == first.against(formats).totals


def test_attention_has_gains() -> None:
    model = block()
    found = gains(model, more(model, 1))
    assert found.measured == set(model.sites)
    assert all(0 < value < math.inf for value in found.norm.values())


@pytest.mark.parametrize("make", [mlp, cnn, block])
def test_rounding_activations_raises_every_variant_by_its_own_term(make: object) -> None:
    model: ElasticModel = make()  # type: ignore[operator]
    formats: dict[str, Format] = dict.fromkeys(model.sites, Dense(8))
    meter = Meter(model, more(model, 2))
    on, off = meter.against(formats), meter.against(formats, activations=False)
    for name, (total, without) in on.totals.items():
        assert total > without > 0
        assert off.totals[name][0] == off.totals[name][1]
        assert off.totals[name][0] == pytest.approx(without, rel=0.05)  # other prefix, same weights
    assert all(share.rounding > 0 for share in on.shares.values())
    assert all(share.rounding == 0 for share in off.shares.values())


def test_smaller_profiles_never_have_a_smaller_proxy() -> None:
    model = mlp()
    plans = [
        {n: LowRank(r, 32) for n in ("fc0", "fc1", "fc2")} | {"head": Dense(32)} for r in (8, 48)
    ]
    # rounding to 4 bits is coarser than rank 48 in float is: raised, and the raw value kept
    plans.insert(1, {n: LowRank(16, 32) for n in ("fc0", "fc1", "fc2")} | {"head": Dense(32)})
    profiles = chain(*plans)
    meter = Meter(model, more(model, 2), damage={n: {} for n in model.sites})
    worse = Meter.against

    def planted(self: Meter, formats: Mapping[str, Format], *args: object) -> object:
        found = worse(self, formats, *args)  # type: ignore[arg-type]
        if formats == profiles.profiles[0].formats and not args:
            found.totals[PAPER] = (1e-9, 1e-9)  # type: ignore[index]
        return found

    meter.against = planted.__get__(meter)  # type: ignore[method-assign]
    found = proxies(meter, profiles)
    small, middle, large = (found[p.name].paper for p in profiles)
    assert small.raw == 1e-9
    assert small.value == middle.value == middle.raw > large.value > 0
    assert large.teacher == 0.0
    assert middle.teacher > 0
    certified = with_proxies(profiles, found)
    assert [p.certificate.proxy for p in certified] == list(found.values())


def test_the_largest_profile_equals_the_teacher_column_where_it_is_the_original() -> None:
    model = mlp()
    full: dict[str, Format] = dict.fromkeys(model.sites, Dense(32))
    low: dict[str, Format] = {**full, "fc1": LowRank(16, 32)}
    found = proxies(Meter(model, more(model, 2)), chain(low, full))
    assert found["p1"].paper.raw == 0.0
    assert found["p0"].paper.teacher == pytest.approx(found["p0"].paper.raw, rel=1e-5)


def test_measured_drifts_combine_by_root_of_squares() -> None:
    model = mlp()
    formats: dict[str, Format] = dict.fromkeys(model.sites, Dense(8))
    damage: Damage = {name: {Dense(8): 1e-4} for name in model.sites}
    batches = more(model, 2)
    meter = Meter(model, batches, damage=damage)
    with torch.no_grad():
        outputs = torch.cat([model(*b)[0] for b in batches])
    assert meter.against(formats).totals[MEASURED][0] == pytest.approx(_rms(outputs) * 0.02)
    assert MEASURED not in Meter(model, batches).against(formats).totals


def test_a_corrupt_factor_comes_first_in_the_report() -> None:
    model = mlp()
    formats: dict[str, Format] = {**dict.fromkeys(model.sites, LowRank(32)), "head": Dense(8)}
    for layer in list(model.layers.values())[:3]:
        layer.factor("low")
    before = proxies(Meter(model, more(model, 2)), chain(formats))["p0"]
    assert before.ranked("kronecker")[0][0] != "fc1"
    low = model.layers["fc1"].factor("low").detach().clone()
    low[3] *= -4
    model.set_factors("fc1", {"low": low, "high": model.layers["fc1"].factor("high")})
    after = proxies(Meter(model, more(model, 2)), chain(formats))["p0"]
    for variant in (PAPER, "jacobian-rms", "kronecker", "kronecker-rss"):
        assert after.ranked(variant)[0][0] == "fc1"
        assert sum(share for _, share in after.ranked(variant)) == pytest.approx(1.0)


def test_alpha_spreads_over_draws_that_differ() -> None:
    model = mlp()
    (x,) = model.example_inputs
    formats: dict[str, Format] = dict.fromkeys(model.sites, Dense(8))
    assert Meter(model, [(x,)] * 3).against(formats).spread == pytest.approx(0.0, abs=1e-6)
    assert Meter(model, [(x,), (x,), (3 * x,)]).against(formats).spread > 0.5


def test_no_inputs_is_an_error() -> None:
    with pytest.raises(CertificateError, match="at least one batch of inputs; got none"):
        Meter(mlp(), [])
