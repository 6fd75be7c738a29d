import math

import pytest
import torch
from torch import Tensor, nn

from t3c.certificate.sound.form import Form, Mode, NoRule, Space, constant
from t3c.certificate.sound.normed import norm, roundings, softmax
from t3c.certificate.sound.pair import Pair
from tests.certificate.sound.samples import at, encloses, pair_in, point, space_of, symbols

KINDS: list[tuple[Mode, bool]] = [
    ("symbols", False),
    ("symbols", True),
    ("interval", False),
    ("norm", False),
    ("both", False),
]
SIZES = [(0.02, 0.01), (0.3, 0.1), (3.0, 2.0)]


@pytest.mark.parametrize(("mode", "ball"), KINDS)
def test_softmax_encloses_every_member(mode: Mode, ball: bool) -> None:
    torch.manual_seed(0)
    seen = torch.tensor([[True] * 4, [True, False, True, True], [False, True, False, False]])
    for size, apart in SIZES:
        for mask in (None, seen):
            space = space_of(mode, ball)
            p = pair_in(space, 3, 4, size=size, apart=apart)
            made = softmax(p, mask)
            for _ in range(25):
                s = symbols(space_of(mode, ball))
                x, d = at(p.x, *s), at(p.d, *s)
                hide = torch.zeros_like(x) if mask is None else (~mask).double() * -1e30
                before, after = torch.softmax(x + hide, -1), torch.softmax(x + d + hide, -1)
                assert encloses(made.x, before, *s)
                assert encloses(made.d, after - before, *s)


def plain(x: Tensor, eps: float, centred: bool) -> Tensor:
    u = x - x.mean(-1, keepdim=True) if centred else x
    return u / (u.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("mode", "ball"), KINDS)
def test_norms_enclose_every_member(mode: Mode, ball: bool, centred: bool) -> None:
    torch.manual_seed(0)
    for size, apart in SIZES:
        for eps in (1e-5, 0.5):
            space = space_of(mode, ball)
            p = pair_in(space, 3, 6, size=size, apart=apart)
            gain, bias = torch.randn(6), torch.randn(6)
            made = norm(p, gain, bias, eps, centred=centred)
            for _ in range(25):
                s = symbols(space_of(mode, ball))
                x, d = at(p.x, *s), at(p.d, *s)
                before = plain(x, eps, centred) * gain + bias
                after = plain(x + d, eps, centred) * gain + bias
                assert encloses(made.x, before, *s)
                assert encloses(made.d, after - before, *s)


def test_two_scores_by_hand() -> None:
    space = Space("interval")
    x = constant(space, torch.zeros(1, 2)).widened(torch.tensor([[1.0, 0.0]]).double())
    made = softmax(Pair(x, constant(space, torch.zeros(1, 2))))
    assert float(made.x.low[0, 0]) == pytest.approx(1 / (1 + math.e), rel=1e-6)
    assert float(made.x.high[0, 0]) == pytest.approx(math.e / (1 + math.e), rel=1e-6)
    assert float(made.d.peak.max()) < 1e-9


def test_no_share_changes_by_more_than_the_tanh_of_a_quarter_of_the_gap() -> None:
    space = Space("interval")
    x = constant(space, torch.zeros(1, 2)).widened(torch.full((1, 2), 50.0).double())
    d = constant(space, torch.zeros(1, 2)).widened(torch.tensor([[0.5, 0.5]]).double())
    made = softmax(Pair(x, d))
    assert float(made.d.high.max()) == pytest.approx(math.tanh(0.25), rel=1e-6)


@pytest.mark.parametrize("far", [20.0, 60.0, 100.0, 300.0])
def test_shares_may_turn_over_however_far_apart_the_scores_are(far: float) -> None:
    space = Space("interval")
    scores = torch.tensor([[far, 0.0]]).double()
    before, after = torch.softmax(scores, -1), torch.softmax(scores.flip(-1), -1)
    for wide in (0.0, 2 * far):
        x = constant(space, scores).widened(torch.full_like(scores, wide))
        d = constant(space, 0 * scores).widened(torch.full_like(scores, far))
        made = softmax(Pair(x, d)).d
        assert bool((made.low <= after - before).all())
        assert bool((after - before <= made.high).all())


def test_norms_stay_within_what_normalizing_implies() -> None:
    space = Space("interval")
    wide = constant(space, torch.zeros(1, 9)).widened(torch.full((1, 9), 20.0).double())
    made = norm(Pair(wide, constant(space, torch.zeros(1, 9))), None, None, 1e-3, centred=True)
    assert float(made.x.peak.max()) == pytest.approx(math.sqrt(8), rel=1e-2)
    made = norm(Pair(wide, constant(space, torch.zeros(1, 9))), None, None, 1e-3, centred=False)
    assert float(made.x.peak.max()) == pytest.approx(3, rel=1e-2)


def test_one_point_is_normalized_to_one_point() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7)
    layer = nn.LayerNorm(7).requires_grad_(False)
    made = norm(point(Space(), x), layer.weight, layer.bias, layer.eps, centred=True)
    assert torch.allclose(made.x.c, layer(x).double(), atol=1e-5)
    assert float((made.x.high - made.x.low).max()) < 2e-4
    assert bool((made.x.low <= layer(x)).all())
    assert bool((layer(x) <= made.x.high).all())


def test_float32_norms_of_offset_rows_lie_within_the_margin() -> None:
    torch.manual_seed(0)
    for offset in (0.0, 10.0, 100.0):
        x = torch.randn(64, 33) + offset
        made = norm(point(Space("interval"), x), None, None, 1e-5, centred=True)
        y = nn.functional.layer_norm(x, (33,)).double()
        assert bool(((made.x.low <= y) & (y <= made.x.high)).all())


def test_a_row_whose_variance_float32_may_lose_has_no_rule() -> None:
    x = torch.full((1, 8), 1e4) + 1e-3 * torch.randn(1, 8)
    with pytest.raises(NoRule, match="variance"):
        norm(point(Space("interval"), x), None, None, 1e-12, centred=True)


def test_a_row_that_sees_nothing_has_no_rule() -> None:
    with pytest.raises(NoRule, match="sees nothing"):
        softmax(point(Space(), torch.zeros(1, 2)), torch.tensor([[False, False]]))


def test_float32_softmax_lies_within_its_roundings() -> None:
    torch.manual_seed(0)
    x = 20 * torch.randn(50, 17)
    p = point(Space("interval"), x)
    made = softmax(p)
    made = Pair(made.x, made.d, shares=roundings(p)).settled()
    y = torch.softmax(x, -1).double()
    normal = y > 1e-37
    assert bool(((made.x.low <= y) & (y <= made.x.high))[normal].all())


def test_known_ends_far_within_the_symbols_become_symbols() -> None:
    space = Space(values=1)
    c = torch.zeros(2, dtype=torch.float64)
    g = torch.tensor([[10.0, 1.0]], dtype=torch.float64)
    form = Form(space, c, g, g[:0], c, 0.0).tightened(c - 1, c + 1)
    made = form.cut("value")
    assert made.g[0].tolist() == [0.0, 1.0]
    bare = Form(space, made.c, made.g, made.h, made.e, made.r)
    assert float(bare.peak[0]) == pytest.approx(1)
    assert space.values == 2
