"""What calibration collects, and codes that it chooses: smaller ranks are slices of larger ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from t3c.controller.calibrate import collect, factorize, round_weights, split
from t3c.core.code_storage import CodeStorage
from t3c.core.codes import Grouped, Matrix
from t3c.core.formats import Dense, Format, LowRank
from t3c.elastic.model import ElasticModel
from t3c.elastic.rounding import round_groups, round_rows
from tests.controller import models

SMALL, LARGE = 8, 24


def rounded(rank: int, bits: int) -> ElasticModel:
    """A model calibrated for ranks up to this one."""
    model, batches = models.block(), models.more(models.block(), 4)
    moments = collect(model, batches)
    factorize(model, moments, most=dict.fromkeys(model.sites, (rank,)))
    menu: dict[str, list[Format]] = {n: [Dense(8), LowRank(rank, bits)] for n in model.sites}
    round_weights(model, moments, menu)
    return model


def equal(one: Matrix | Grouped | None, two: Matrix | Grouped | None) -> bool:
    assert one is not None
    assert two is not None
    return np.array_equal(one.q, two.q) and np.array_equal(one.scale, two.scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_export_of_a_smaller_rank_is_a_slice_of_the_codes(bits: int) -> None:
    model = rounded(LARGE, bits)
    small, large = LowRank(SMALL, bits), LowRank(LARGE, bits)
    low, high = ("low", "high") if bits == 8 else ("low4", "high4")
    for site in model.sites:
        export, whole = model.codes(site, [small]), model.codes(site, [small, large])
        assert equal(getattr(export, low), getattr(whole, low).prefix(SMALL))
        assert equal(getattr(export, high), getattr(whole, high).prefix(None, SMALL))


@pytest.mark.parametrize("bits", [8, 4])
def test_error_feedback_leaves_the_first_components_what_they_are_alone(bits: int) -> None:
    alone, among = rounded(SMALL, bits), rounded(LARGE, bits)
    name = "low" if bits == 8 else "low4"
    for site in alone.sites:
        few = getattr(alone.codes(site, [LowRank(SMALL, bits)]), name)
        many = getattr(among.codes(site, [LowRank(LARGE, bits)]), name)
        assert equal(few, many.prefix(SMALL))


def test_codes_of_each_width_alone_are_those_that_there_are_without_another_width() -> None:
    model = models.block()
    moments = collect(model, models.more(model, 4))
    whole: list[Format] = [Dense(8), Dense(4)]
    round_weights(model, moments, dict.fromkeys(model.sites, whole))
    round_weights(model, moments, dict.fromkeys(model.sites, whole), stored=CodeStorage.INDEPENDENT)
    for name, layer in model.layers.items():
        codes, moment = model.codes(name, whole), moments[name].mean()
        assert codes.nested is None  # nor is anything left of the codes that were there before
        assert equal(codes.dense, round_rows(layer.weight, moment))
        assert equal(codes.dense4, round_groups(layer.weight, moment, search=True))


def test_windows_are_told_the_second_moment_of_their_outputs() -> None:
    model = models.cnn()
    batches = models.more(model, 3)
    moments = collect(model, batches)
    layer = model.layers["stem"]
    assert layer.bias is not None
    rows = [
        (layer(x) - layer.bias[:, None, None]).movedim(1, -1).reshape(-1, 32) for (x,) in batches
    ]
    seen = torch.cat(rows).detach()
    want = seen.T @ seen / len(seen)
    assert moments["stem"].outputs is not None
    torch.testing.assert_close(moments["stem"].outputs, want, rtol=1e-4, atol=1e-4)
    assert moments["head"].outputs is None
    kept = {name: replace(moment, outputs=None) for name, moment in moments.items()}
    assert (moments["stem"] + kept["stem"]).outputs is None
    one, two = (split(layer, m["stem"]) for m in (moments, kept))
    assert not torch.equal(one["expand"], two["expand"])
