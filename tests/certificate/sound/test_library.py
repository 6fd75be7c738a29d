from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import t3c
from t3c.certificate.sound import Domain


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.l = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (p.view(1, 3, 2, 32).transpose(1, 2) for p in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).reshape(1, 3, 64))
        y: Tensor = self.l(x.mean(1))
        return y


@pytest.mark.slow
def test_the_compiled_library_drifts_less_than_its_certificate_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64)
    net = Block().eval()
    artifact = t3c.lower(
        net,
        "x86",
        (x,),
        tmp_path / "net",
        calibration=[(torch.randn(1, 3, 64),) for _ in range(4)],
        plan_seconds=1.0,
        calls=0,
        domain=Domain.around([(x,)], 0.02),
        say=lambda line: None,
    )
    session = t3c.load(artifact)
    for profile in session.profiles:
        sound = profile.certificate.sound
        assert sound is not None
        assert sound.status in ("bound", "vacuous")
        session.set_profile(profile.name)
        for _ in range(300):
            z = x + 0.02 * (2 * torch.rand_like(x) - 1).sign()
            with torch.no_grad():
                drift = float((session(z) - net(z)).norm())
            assert drift <= sound.raw < 50
