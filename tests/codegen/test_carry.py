"""Int8 tensors that flow between convolutions: whole libraries agree with the torch reference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import t3c
from t3c.codegen import families
from t3c.core.errors import TargetError
from t3c.core.formats import CP, Dense, LowRank, Tucker2
from t3c.core.manifest import Manifest
from t3c.targets import detect_host
from t3c.targets.base import Roofline

ARITHMETIC = Roofline(1e9, 1e12, 1e15, 1e-15, 1e-15, 1e-9)
"""Multiply-adds cost, nothing else: every factorized format pays."""


class Residual(nn.Module):
    """Stem, pooling, a block with a shortcut, a strided block, a shared layer, float readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 16, 7, 2, 3), nn.MaxPool2d(3, 2, 1)
        self.a, self.b, self.c = (
            nn.Conv2d(16, 32, 1),
            nn.Conv2d(32, 32, 3, 1, 1),
            nn.Conv2d(32, 48, 1),
        )
        self.short = nn.Conv2d(16, 48, 1)
        self.down, self.skip = nn.Conv2d(48, 64, 3, 2, 1), nn.Conv2d(48, 64, 1, 2, bias=False)
        self.valid, self.same = nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(torch.relu(self.stem(x)))
        y = torch.relu(self.b(torch.relu(self.a(x))))
        x = torch.relu(self.c(y) + self.short(x))
        x = torch.relu(self.down(x) + self.skip(x))
        z = torch.nn.functional.silu(self.valid(x))
        z = self.same(self.same(z) + z)
        return self.head(z.mean((2, 3))), x


@pytest.fixture(params=["plain", "host"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Loops that anybody can check, and what this machine runs."""
    if request.param == "host":
        host = detect_host()
        if not families.families_of(host).conv.static:
            pytest.skip(f"{host.conv!r} has no static codes")
        return host.conv
    monkeypatch.setitem(families.CONV, "plain", "tests.codegen.plain_conv:PlainConv")
    return "plain"


def manifest_of(
    folder: Path, family: str, conv: str = "tucker2", activations: str = "auto"
) -> Manifest:
    torch.manual_seed(0)
    spec = replace(detect_host(), conv=family, roofline=ARITHMETIC, rank_step=16)
    return t3c.lower(
        Residual().eval(),
        spec,
        (torch.randn(2, 3, 50, 62),),
        folder / "artifact",
        conv=conv,
        activations=activations,
        profiles=4,
        plan_seconds=0.5,
        calls=0,
        say=lambda line: None,
    ).manifest


def check(manifest: Manifest) -> None:
    for compiled in manifest.profiles:
        assert compiled.parity is not None
        assert compiled.parity.relative < 1e-3  # a rounding turned in a small tensor
        assert compiled.parity.free < 1e-2
    stored = [c.profile.storage_bytes for c in manifest.profiles]
    assert stored == sorted(stored)


def test_libraries_agree_with_torch(family: str, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, family)
    check(manifest)
    used = {type(f) for c in manifest.profiles for f in c.profile.formats.values()}
    assert used >= {Dense, LowRank, Tucker2}
    assert any(name.startswith("grid/") for name in manifest.profiles[0].weights)


def test_float_steps_of_cp(family: str, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, family, conv="cp")
    check(manifest)
    assert any(isinstance(f, CP) for f in manifest.profiles[0].profile.formats.values())


def test_dynamic_on_request(family: str, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, family, activations="dynamic")
    check(manifest)
    assert not any(name.startswith("grid/") for name in manifest.profiles[-1].weights)


def test_static_is_refused_where_kernels_lack(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no convolutions on fixed grids"):
        manifest_of(tmp_path, "portable", activations="static")


def test_unknown_spelling(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="activations is 'fixed'; allowed are 'auto', 'static'"):
        manifest_of(tmp_path, "portable", activations="fixed")
