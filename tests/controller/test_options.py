import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3c.controller.options import formats, gate, ranks
from t3c.core.formats import Dense, LowRank, Tucker2, at_most
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.cost_models import cost_model
from t3c.targets.x86 import AMX, VNNI


def conv(out: int, fan_in: int, kernel: int = 3) -> ConvSite:
    pad = (kernel // 2, kernel // 2)
    return ConvSite(
        "c", out, fan_in, (kernel, kernel), (1, 1), pad, (1, 1), 1, (14, 14), (14, 14), True
    )


SITES = st.one_of(
    st.builds(
        LinearSite,
        st.just("fc"),
        st.integers(1, 900),
        st.integers(1, 900),
        st.integers(1, 300),
        st.booleans(),
    ),
    st.builds(conv, st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 3])),
)


@settings(max_examples=200, deadline=None)
@given(SITES, st.sampled_from([16, 32, 64]), st.booleans())
def test_formats_fall_strictly_and_every_rank_is_aligned(site: Site, step: int, fine: bool) -> None:
    menu = formats(site, step, None) if fine else formats(site, step)
    assert menu[0] == Dense(8)
    for large, small in itertools.pairwise(menu):
        assert at_most(small, large)
        assert small != large
    for fmt in menu[1:]:
        assert all(rank % step == 0 and rank >= step for rank in fmt.ranks)
        assert site.elements(fmt) > 0


def test_menus_of_known_layers() -> None:
    assert ranks(768, 64, (0.75, 0.5, 0.35, 0.25, 0.125)) == [576, 384, 256, 192, 128]
    assert ranks(48, 16, None) == [32, 16]
    assert ranks(16, 16, None) == []
    assert formats(conv(64, 64, 1), 16)[1:] == [LowRank(48), LowRank(32), LowRank(16)]
    assert formats(conv(128, 64), 32) == [
        Dense(8),
        Tucker2(64, 96),
        Tucker2(32, 64),
        Tucker2(32, 32),
    ]
    assert formats(conv(64, 3, 7), 16) == [Dense(8)]


def test_the_gate_keeps_dense_and_what_is_faster_and_says_why() -> None:
    site = LinearSite("q", 768, 768, 197, True)
    decisions = gate({"q": site}, 64, cost_model(AMX))
    assert decisions[0].kept
    verdict = {d.format: d.kept for d in decisions}
    assert verdict[LowRank(128)]
    assert not verdict[LowRank(576)]
    slow = next(d for d in decisions if d.format == LowRank(576))
    assert slow.reason.startswith("lowrank-r576-int8 at q: ")
    assert "not faster than dense at" in slow.reason


@pytest.mark.parametrize("fine", [False, True])
def test_the_gate_never_keeps_a_slower_format(fine: bool) -> None:
    sites: dict[str, Site] = {"a": LinearSite("a", 96, 64, 7, True), "c": conv(128, 128)}
    shares = None if fine else (0.75, 0.5, 0.25)
    for d in gate(sites, 16, cost_model(VNNI), shares=shares):
        assert d.kept == (isinstance(d.format, Dense) or d.predicted_s < d.dense_predicted_s)


def test_layers_that_wait_for_weights_take_four_bits() -> None:
    one, many = LinearSite("one", 4096, 4096, 1, True), LinearSite("many", 768, 768, 128, True)
    for spec in (AMX, VNNI):
        decisions = gate({"one": one, "many": many}, 64, cost_model(spec), four=True)
        decode = [d for d in decisions if d.site == "one"]
        assert [d.format for d in decode[:2]] == [Dense(8), Dense(4)]
        assert all(d.format.bits == 4 for d in decode[1:])
        assert all(at_most(b.format, a.format) for a, b in itertools.pairwise(decode))
        assert decode[1].predicted_s < 0.7 * decode[0].predicted_s
        assert all(d.predicted_s < decode[1].predicted_s for d in decode[2:] if d.kept)
        assert all(d.format.bits == 8 for d in decisions if d.site == "many")
    assert all(d.format.bits == 8 for d in gate({"one": one}, 64, cost_model(VNNI)))
