"""CP convolutions, two integer and two float32 steps, compute what the torch layer does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import t3c
from t3c.codegen.weights import ConvStep, DepthwiseStep, conv_steps
from t3c.core.formats import CP
from t3c.elastic.conv import ElasticConv
from t3c.targets import detect_host
from t3c.targets.base import Roofline, TargetSpec
from tests.controller.models import conv

ARITHMETIC = Roofline(1e9, 1e12, 1e15, 1e-15, 1e-15, 1e-9)
"""Multiply-adds cost, nothing else: CP pays at any size."""
HOST = replace(detect_host(), roofline=ARITHMETIC)
GENERIC = replace(HOST, name="generic", linear="generic", conv="generic")


class Windows(nn.Module):
    """Oblong windows, strides and paddings; dilation, no bias, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.oblong = nn.Conv2d(24, 40, (3, 5), (2, 1), (1, 2))
        self.dilated = nn.Conv2d(40, 40, 3, 1, 2, dilation=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.oblong(x))
        return torch.relu(self.dilated(y) + y)


@pytest.mark.parametrize("spec", [HOST, GENERIC], ids=["kernels", "generic"])
def test_libraries_agree_with_torch(spec: TargetSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = t3c.lower(
        Windows().eval(),
        spec,
        (torch.randn(2, 24, 11, 14),),
        tmp_path / "artifact",
        conv="cp",
        profiles=3,
        plan_seconds=0.5,
        calls=0,
        say=lambda line: None,
    )
    small, middle, _ = artifact.manifest.profiles
    assert any(isinstance(fmt, CP) for fmt in small.profile.formats.values())
    assert small.profile.formats != middle.profile.formats  # one of them reads prefixes
    for compiled in artifact.manifest.profiles:
        assert compiled.parity is not None
        assert compiled.parity.relative < 1e-3
    stored = [c.profile.storage_bytes for c in artifact.manifest.profiles]
    assert stored == sorted(stored)


def test_steps_share_the_window_between_both_axes() -> None:
    layer: ElasticConv = conv("c", 32, 32, 12, 2)
    layer.kxk = "cp"
    layer.factorize(CP)
    first, tall, wide, last = conv_steps(layer.site, layer.codes([CP(16), CP(40)]), CP(16))
    assert isinstance(tall, DepthwiseStep)
    assert isinstance(wide, DepthwiseStep)
    assert isinstance(last, ConvStep)
    assert (tall.shape.kernel, tall.shape.stride, tall.shape.padding) == ((3, 1), (2, 1), (1, 0))
    assert (wide.shape.kernel, wide.shape.stride, wide.shape.padding) == ((1, 3), (1, 2), (0, 1))
    assert first.shape.out_size == tall.shape.in_size
    assert tall.shape.out_size == wide.shape.in_size
    assert wide.shape.out_size == last.shape.out_size == layer.site.out_size
    assert (tall.stored, tall.weight.shape) == (48, (40, 1, 3, 1))
    assert all(array.nbytes % 64 == 0 for array in tall.pack().values())
    assert last.last
