"""Tiny networks and the call that lowers them, for tests of the whole flow."""

from typing import Any

import torch
from torch import Tensor, nn

import t3c
from t3c.core.artifact import Artifact


class Mlp(nn.Module):
    """Two linear layers; a dict comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(96, 160)
        self.second = nn.Linear(160, 80)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.first(x))
        return {"logits": self.second(hidden), "hidden": hidden}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**options: Any) -> Artifact:
    """Two layers by default; any argument of `lower` overrides what stands here."""
    defaults: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval(),
        "target": "x86",
        "example_inputs": (draw(0, 2, 64),),
        "profiles": 2,
        "plan_seconds": 0.5,
        "calls": 0,
        "say": lambda line: None,
    }
    return t3c.lower(**(defaults | options))
