import pytest
import torch

from t3c.certificate.sound.form import Form, Mode, NoRule, Space
from t3c.certificate.sound.pair import Pair
from t3c.certificate.sound.product import elementwise, multiplied, product
from tests.certificate.sound.samples import at, encloses, pair_in, point, space_of, symbols

KINDS: list[tuple[Mode, bool]] = [
    ("symbols", False),
    ("symbols", True),
    ("interval", False),
    ("norm", False),
    ("both", False),
]


@pytest.mark.parametrize(("mode", "ball"), KINDS)
def test_products_of_members_are_members_of_the_product(mode: Mode, ball: bool) -> None:
    torch.manual_seed(0)
    for _ in range(2):
        space = space_of(mode, ball)
        a, b = pair_in(space, 2, 3, 4), pair_in(space, 2, 4, 5)
        made = multiplied(a, b)
        for _ in range(60):
            s = symbols(space_of(mode, ball))
            (x, dx), (y, dy) = ((at(p.x, *s), at(p.d, *s)) for p in (a, b))
            assert encloses(made.x, x @ y, *s)
            assert encloses(made.d, (x + dx) @ (y + dy) - x @ y, *s)


def test_a_square_of_one_symbol_lies_between_zero_and_one() -> None:
    space = Space(values=1)
    g = torch.ones(1, 1, 1, dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    one = Form(space, zero, g, zero.new_zeros(0, 1, 1), zero, 0.0)
    made = product(one, one, "value")
    assert float(made.low) == pytest.approx(0, abs=1e-12)
    assert float(made.high) == pytest.approx(1)


def test_what_cancels_in_a_sum_of_products_cancels_in_the_form() -> None:
    space = Space(values=2)
    # (s1, s2) . (s2, -s1) = 0 for all symbols
    a = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    b = torch.tensor([[[0.0], [-1.0]], [[1.0], [0.0]]], dtype=torch.float64)

    def form(g: torch.Tensor) -> Form:
        zero = torch.zeros(g.shape[1:], dtype=torch.float64)
        return Form(space, zero, g, g[:0], zero, 0.0)

    made = product(form(a), form(b), "value")
    assert float(made.peak) == pytest.approx(0, abs=1e-12)


def test_symbols_of_a_ball_are_not_all_at_their_ends() -> None:
    g = torch.eye(4, dtype=torch.float64)
    for ball, most in ((0, 4.0), (4, 2.0)):  # ||s||^2 <= 4 in the box; the ball's ||I||_F is 2
        space = Space(ball=ball, values=4)

        def form(g: torch.Tensor, space: Space = space) -> Form:
            c = torch.zeros(g.shape[1:], dtype=torch.float64)
            return Form(space, c, g, g[:0], c, 0.0)

        made = product(form(g[:, None, :]), form(g[:, :, None]), "value")
        assert float(made.high) == pytest.approx(most)


def test_more_symbols_than_are_kept_together_still_enclose(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr("t3c.certificate.sound.product.SHARED", 6)
    space = space_of("symbols", True)
    a, b = pair_in(space, 2, 3), pair_in(space, 3, 2)
    made = multiplied(a, b)
    for _ in range(200):
        s = symbols(space_of("symbols", True))
        (x, dx), (y, dy) = ((at(p.x, *s), at(p.d, *s)) for p in (a, b))
        assert encloses(made.x, x @ y, *s)
        assert encloses(made.d, (x + dx) @ (y + dy) - x @ y, *s)


def test_elements_multiply_and_do_not_broadcast() -> None:
    space = Space()
    made = elementwise(
        point(space, torch.tensor([2.0, 3.0])), point(space, torch.tensor([5.0, -7.0]))
    )
    assert torch.allclose(made.x.c, torch.tensor([10.0, -21.0], dtype=torch.float64))
    assert float(made.d.peak.max()) < 1e-4
    with pytest.raises(NoRule, match="broadcast"):
        elementwise(point(space, torch.ones(2)), point(space, torch.ones(1)))


def test_a_difference_of_zero_stays_zero_without_roundings() -> None:
    space = space_of("symbols", False)
    a, b = (pair_in(space, 2, 2) for _ in range(2))
    none = Form(space, a.x.c * 0, a.x.g[:0], a.x.g[:0], a.x.c * 0, 0.0)
    made = multiplied(Pair(a.x, none), Pair(b.x, none))
    assert float(made.d.peak.max()) < 1e-12
