import math

import pytest
import torch
from torch import Tensor

from t3c.certificate.sound.attention import attention, weighted
from t3c.certificate.sound.form import Mode, NoRule, Space
from t3c.certificate.sound.normed import softmax
from tests.certificate.sound.samples import at, encloses, pair_in, point, space_of, symbols

KINDS: list[tuple[Mode, bool]] = [("symbols", False), ("symbols", True), ("interval", False)]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = 0.5 * q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -math.inf)
    return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("mode", "ball"), KINDS)
def test_attention_encloses_every_member(mode: Mode, ball: bool, causal: bool) -> None:
    torch.manual_seed(0)
    biased = torch.randn(2, 4, 4)
    biased[:, :, 3] = -math.inf
    for size, apart in ((0.03, 0.02), (0.4, 0.2)):
        for mask in (None, biased):
            space = space_of(mode, ball)
            q, k, v = (pair_in(space, 2, 4, n, size=size, apart=apart) for n in (3, 3, 2))
            made = attention(q, k, v, mask, causal, 0.5)
            for _ in range(30):
                s = symbols(space_of(mode, ball))
                old = [at(p.x, *s) for p in (q, k, v)]
                new = [x + at(p.d, *s) for x, p in zip(old, (q, k, v), strict=True)]
                before = exact(old[0], old[1], old[2], mask, causal)
                after = exact(new[0], new[1], new[2], mask, causal)
                assert encloses(made.x, before, *s)
                assert encloses(made.d, after - before, *s)


def test_means_stay_in_the_hull_of_what_is_averaged() -> None:
    space = Space("interval")
    scores = point(space, torch.zeros(1, 3))
    wide = scores.x.widened(torch.full((1, 3), 100.0).double())
    shares = softmax(type(scores)(wide, scores.d))
    v = point(space, torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]))
    made = weighted(shares, v, 0.0)
    assert torch.allclose(made.x.low, torch.tensor([[1.0, 4.0]]).double(), atol=1e-4)
    assert torch.allclose(made.x.high, torch.tensor([[3.0, 6.0]]).double(), atol=1e-4)


def test_a_common_offset_of_values_costs_nothing() -> None:
    torch.manual_seed(0)
    found = []
    for offset in (0.0, 100.0):
        space = space_of("symbols", False)
        torch.manual_seed(1)
        scores, v = pair_in(space, 2, 3), pair_in(space, 3, 2, apart=0.0)
        v = type(v)(v.x + point(space, torch.full((3, 2), offset)).x, v.d)
        found.append(float(weighted(softmax(scores), v, 0.0).d.peak.max()))
    assert found[1] == pytest.approx(found[0], abs=1e-3)  # but for float32


def test_codes_of_16_bits_widen_the_difference_alone() -> None:
    torch.manual_seed(0)
    narrow = [point(Space(), torch.randn(1, 2, 4, 12)) for _ in range(3)]
    wide = [point(Space(), torch.randn(1, 2, 4, 16)) for _ in range(3)]
    plain, coded = (attention(p[0], p[1], p[2], None, False, 0.25) for p in (narrow, wide))
    assert float(plain.d.peak.max()) < 1e-3
    assert 1e-3 < float(coded.d.peak.max()) < 2e-2
    assert float((coded.x.high - coded.x.low).max()) < 1e-3


def test_masks_that_hide_a_whole_row_have_no_rule() -> None:
    q = point(Space(), torch.randn(1, 2, 4))
    with pytest.raises(NoRule, match="sees nothing"):
        attention(q, q, q, torch.full((2, 2), -math.inf), False, 1.0)
    made = attention(q, q, q, torch.tensor([[True, False], [True, True]]), False, 1.0)
    assert torch.allclose(made.x.c[0, 0], q.x.c[0, 0], atol=1e-6)
