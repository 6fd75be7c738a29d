"""Small networks that are lowered whole in tests, and how."""

from pathlib import Path

import torch
from torch import Tensor, nn

import t3c
from t3c.core.artifact import Artifact
from t3c.targets import TargetSpec


class Block(nn.Module):
    """A transformer block: norm, masked attention, residuals, GELU."""

    def __init__(self, width: int = 80, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        batch, length, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return {"y": x + self.down(nn.functional.gelu(self.up(x)))}


class Convolutions(nn.Module):
    """Two convolutions, the second with stride; pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        y: Tensor = self.head(torch.relu(self.second(x)).mean((2, 3)))
        return y


def lower(name: str, target: str | TargetSpec, out: Path) -> tuple[Artifact, list[str]]:
    """Lower ``mlp``, ``rms``, ``block`` or ``conv``: the artifact and what was told."""
    torch.manual_seed(0)
    model: nn.Module
    match name:
        case "mlp":
            model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 10))
            inputs: tuple[Tensor, ...] = (torch.randn(5, 64),)
        case "rms":
            layers = nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 10)
            model = nn.Sequential(nn.RMSNorm(64, 1e-6), *layers)
            inputs = (torch.randn(5, 64),)
        case "block":
            model = Block()
            mask = torch.zeros(1, 1, 72, 72)
            mask[..., 50:] = -1e9
            inputs = (torch.randn(1, 72, 80), mask)
        case _:
            model, inputs = Convolutions(), (torch.randn(1, 3, 16, 16),)
    told: list[str] = []
    artifact = t3c.lower(
        model.eval(),
        target,
        inputs,
        out,
        profiles=2,
        plan_seconds=1,
        calls=0,  # what is measured decides which profiles stay: not here
        say=told.append,
    )
    return artifact, told
