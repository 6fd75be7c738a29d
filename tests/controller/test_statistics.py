"""Corrections: statistics restored, shared codes, and libraries that compute what they say."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import t3c
from t3c.codegen.build import Built, build
from t3c.controller.plan import Plan, plan
from t3c.controller.statistics import GAINS, Statistics, correct, normalized_sites
from t3c.core.codes import Correction
from t3c.core.errors import T3CError
from t3c.core.formats import Dense, Format, Tucker2
from t3c.core.profile import ProfileChain
from t3c.elastic.model import ElasticModel
from tests.front import elasticize


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, 16, 10, 10))
    return model.eval()


def batches(count: int = 4) -> list[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 16, 10, 10, generator=draw),) for _ in range(count)]


def elastic_network() -> tuple[ElasticModel, dict[str, Format]]:
    elastic = elasticize(network(), batches()[0])
    formats: dict[str, Format] = {}
    for name, layer in elastic.layers.items():
        layer.factorize(Tucker2)
        formats[name] = Tucker2(12, 48)
    return elastic, formats


def outputs(elastic: ElasticModel, formats: Mapping[str, Format] | None) -> Tensor:
    """Before the last ReLU, of all batches."""
    (node,) = [n for n, x in normalized_sites(elastic).items() if x.site.name == "3"]
    kept: list[Tensor] = []
    handle = elastic.graph.get_submodule(str(node.target)).register_forward_hook(
        lambda _m, _x, y: kept.append(torch.as_tensor(y))
    )
    with elastic.using(formats), torch.no_grad():
        for batch in batches():
            elastic.graph(*batch)
    handle.remove()
    return torch.cat(kept)


def test_mean_and_variance_of_cut_layers_are_the_originals() -> None:
    elastic, formats = elastic_network()
    want = Statistics.of([outputs(elastic, None)])
    before = Statistics.of([outputs(elastic, formats)])
    assert correct(elastic, [formats], batches()) == 4
    after = Statistics.of([outputs(elastic, formats)])
    assert float((before.deviation / want.deviation - 1).abs().max()) > 0.1
    gain = torch.from_numpy(elastic.corrections(formats)["3"].gain)
    inside = gain < GAINS[1]  # the others stop at the bound
    assert int(inside.sum()) > len(gain) // 2
    torch.testing.assert_close(after.deviation[inside], want.deviation[inside], rtol=1e-2, atol=0)
    torch.testing.assert_close(after.mean, want.mean, rtol=1e-2, atol=1e-2)


def test_a_channel_that_was_scaled_is_restored() -> None:
    elastic, formats = elastic_network()
    formats["3"] = Dense(32)
    with torch.no_grad():
        high = elastic.layers["0"].factor("expand")
        elastic.set_factors("0", {
            "reduce": elastic.layers["0"].factor("reduce"),
            "core": elastic.layers["0"].factor("core"),
            "expand": torch.cat((high[:1] * 1.5, high[1:])),
        })  # fmt: skip
    correct(elastic, [formats], batches())
    scaled = elastic.corrections(formats)["0"].gain
    other, _ = elastic_network()
    correct(other, [formats], batches())
    plain = other.corrections(formats)["0"].gain
    assert scaled[0] == pytest.approx(plain[0] / 1.5, rel=2e-2)
    np.testing.assert_allclose(scaled[1:], plain[1:], rtol=2e-2)


def test_nothing_is_corrected_without_batch_norms_or_cut_ranks() -> None:
    elastic, formats = elastic_network()
    assert correct(elastic, [dict.fromkeys(formats, Dense(8))], batches()) == 0
    plain = elasticize(nn.Sequential(nn.Conv2d(16, 16, 3)).eval(), batches()[0])
    plain.layers["0"].factorize(Tucker2)
    assert correct(plain, [{"0": Tucker2(8, 8)}], batches()) == 0


def test_values_that_are_not_finite_are_refused() -> None:
    elastic, formats = elastic_network()
    with pytest.raises(T3CError, match="outputs of '0' are not finite"):
        correct(elastic, [formats], [(torch.full((2, 16, 10, 10), float("inf")),)] * 2)


def test_corrections_that_do_not_fit_are_refused() -> None:
    elastic, formats = elastic_network()
    ones = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="cannot take a correction of 3 channels"):
        elastic.set_corrections(formats, {"0": Correction(ones, ones)})
    with pytest.raises(ValueError, match="one gain and bias a channel"):
        Correction(ones, ones[:2])
    wide: Any = ones.astype(np.float64)
    with pytest.raises(TypeError, match="need float32"):
        Correction(wide, ones)
    with pytest.raises(ValueError, match="not finite"):
        Correction(ones * np.float32("nan"), ones)


def two_profiles(
    elastic: ElasticModel, data: Sequence[tuple[Tensor, ...]], *args: Any, **kwargs: Any
) -> Plan:
    """Tucker-2 for the smaller profile, dense for the larger."""
    made = plan(elastic, data, *args, **kwargs)
    for layer in elastic.layers.values():
        layer.factorize(Tucker2)
    cut: dict[str, Format] = {"0": Dense(8), "3": Tucker2(32, 32)}
    whole: dict[str, Format] = {"0": Dense(8), "3": Dense(8)}
    last = made.chain.profiles[-1]
    pair = (
        replace(last, name="tiny", formats=cut, macs=last.macs // 2),
        replace(last, name="max", formats=whole),
    )
    correct(elastic, [cut], data)
    return replace(made, chain=ProfileChain(pair))


def lowered(out: Path) -> t3c.Artifact:
    return t3c.lower(
        network(), "x86-avx2", batches()[0], out, calibration=batches(), profiles=2,
        plan_seconds=0.5, calls=0, planner=two_profiles, say=lambda _: None,
    )  # fmt: skip


def test_profiles_share_codes_and_keep_scales_of_their_own(tmp_path: Path) -> None:
    """Parity is proved by `lower` itself."""
    artifact = lowered(tmp_path / "net")
    reads = {c.profile.name: set(c.weights) for c in artifact.manifest.profiles}
    assert any(n.endswith("scale@tiny") for n in reads["tiny"])
    assert any(n.endswith("bias@tiny") for n in reads["tiny"])
    assert not any("@" in n for n in reads["max"])
    shared = reads["tiny"] & reads["max"]
    codes = {n for names in reads.values() for n in names if n.startswith("0:") and "@" not in n}
    assert {n for n in codes if not n.endswith(("scale", "bias"))} <= shared


def test_a_wrong_correction_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> Built:
        made = build(*args)
        own = {
            n: t.astype(np.float32) * np.float32(1.2) if "scale@" in n else t
            for n, t in made.tensors.items()
        }
        return replace(made, tensors=own)

    monkeypatch.setattr("t3c.api.build", wrong)
    with pytest.raises(t3c.ParityError, match="relative error"):
        lowered(tmp_path / "net")
