"""The whole flow for AMX, its instructions emulated where the processor lacks them."""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import t3c
from t3c import proof, targets
from t3c.core.formats import LowRank
from t3c.runtime import host
from t3c.targets.x86 import AMX, VNNI

EMULATOR = Path(__file__).parent / "kernels" / "amx_emulator.c"
TILES = frozenset({"amx_tile", "amx_int8"})
TILED = replace(
    AMX, mcpu=VNNI.mcpu, mattr=("+amx-tile", "+amx-int8"), features=VNNI.features | TILES
)
"""x86-amx without the 16-bit floats of its processors, which no emulator here knows."""


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that runs x86-amx: this one, or this one with emulated tiles."""
    missing = TILED.features - targets.cpu_features()
    if not missing:
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not missing <= TILES or compiler is None:
        pytest.skip(f"needs {', '.join(sorted(missing))}; only the tiles can be emulated, by cc")
    library = tmp_path / "amx_emulator.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", EMULATOR, "-o", library], check=True)
    assert ctypes.CDLL(str(library)).amx_emulate() == 0
    monkeypatch.setattr(host, "check", lambda *_: None)
    monkeypatch.setattr(proof, "runs_here", lambda _: True)


class Net(nn.Module):
    """A convolution, a norm that feeds a linear layer, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 128, 4, 4)
        self.conv = nn.Conv2d(128, 128, 3, padding=1)
        self.norm = nn.LayerNorm(128)
        self.up, self.down = nn.Linear(128, 512), nn.Linear(512, 128)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.patch(image)))
        x = x.flatten(2).transpose(1, 2)
        return torch.as_tensor(
            x + self.down(nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))
        )


@pytest.mark.usefixtures("device")
def test_every_profile_is_proved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 20, 20)
    artifact = t3c.lower(
        Net(), TILED, (image,), tmp_path / "net", plan_seconds=1, calls=0, profiles=3
    )
    profiles = artifact.manifest.profiles
    assert artifact.manifest.stages.verified
    assert all(p.parity is not None and p.parity.relative < 1e-5 for p in profiles)
    assert any(isinstance(f, LowRank) for f in profiles[0].profile.formats.values())
