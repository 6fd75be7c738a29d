"""Sound bounds against attacks: no drift may exceed one, and how far above the largest they are.

Small nets trained on synthetic classes; random points and projected gradients on ||dz||.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t3c import elasticize
from t3c.certificate.sound import Ball, Domain, sound_bounds
from t3c.certificate.sound.form import MODES
from t3c.core.formats import Dense, Format, LowRank, Tucker2
from t3c.core.profile import Profile, ProfileChain
from t3c.elastic.model import ElasticModel

STARTS, STEPS = 556, 10


class Conv(nn.Module):
    """Three convolutions, an addition, an average."""

    def __init__(self) -> None:
        """Its layers."""
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.c, self.l = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(self.b(torch.relu(self.a(x))))
        y: Tensor = self.l(torch.relu(x + self.c(x)).mean((2, 3)))
        return y


class Attention(nn.Module):
    """One head, without norms."""

    def __init__(self) -> None:
        """Its layers."""
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 4, -1)
        y: Tensor = (weights @ self.v(x)).mean(1)
        return y


def trained(net: nn.Module, means: Tensor) -> float:
    """Train on noisy copies of each class's mean; the accuracy on fresh ones."""
    adam = torch.optim.Adam(net.parameters(), 3e-3)

    def draw() -> tuple[Tensor, Tensor]:
        y = torch.randint(0, len(means), (256,))
        return means[y] + 0.7 * torch.randn(256, *means.shape[1:]), y

    for _ in range(200):
        x, y = draw()
        loss = nn.functional.cross_entropy(net(x), y)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    x, y = draw()
    return float((net(x).argmax(1) == y).float().mean())


def attack(model: ElasticModel, formats: dict[str, Format], region: Any) -> float:
    """Largest drift: one half of the starts stays, the other climbs."""

    def drift_of(x: Tensor) -> Tensor:
        before = model.graph(x)[0]
        with model.using(formats):
            found: Tensor = (model.graph(x)[0] - before).flatten(1).norm(dim=1)
        return found

    ball = isinstance(region, Ball)
    center = region.center if ball else (region.low + region.high) / 2
    turn = torch.randn(2 * STARTS, *center.shape[1:])
    if ball:
        x = center + region.radius * turn / _norm(turn)
    else:
        x = region.low + (region.high - region.low) * torch.rand_like(turn)
        x[::2] = torch.where(turn[::2] > 0, region.high, region.low)
    worst = float(drift_of(x).max())
    x = x[:STARTS]
    for step in range(STEPS):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(drift_of(x).sum(), x)
        with torch.no_grad():
            size = 0.5 / (step + 1)
            if ball:
                away = x + size * region.radius * slope / _norm(slope) - center
                x = center + away * (region.radius / _norm(away)).clamp_max(1)
            else:
                x = x + size * (region.high - region.low) * slope.sign()
                x = torch.minimum(torch.maximum(x, region.low), region.high)
            worst = max(worst, float(drift_of(x).max()))
    return worst


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = x.flatten(1).norm(dim=1).clamp_min(1e-12)
    return norm.reshape(-1, *[1] * (x.dim() - 1))


def nets() -> dict[str, tuple[nn.Module, tuple[int, ...], list[dict[str, Format]]]]:
    """Net, shape of an input, formats of three profiles."""
    first, second, last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
    mlp = nn.Sequential(first, nn.ReLU(), second, nn.GELU(), last)
    d = Dense(8)
    return {
        "mlp": (mlp, (16,), [{"0": d, "2": f, "4": d} for f in (LowRank(4), LowRank(12), d)]),
        "conv": (
            Conv(),
            (1, 8, 8),
            [{"a": d, "b": d, "c": f, "l": d} for f in (Tucker2(4, 4), Tucker2(10, 10), d)],
        ),
        "attention": (
            Attention(),
            (5, 16),
            [{"q": f, "k": f, "v": d} for f in (LowRank(2), LowRank(5), d)],
        ),
    }


def measured(net: nn.Module, shape: tuple[int, ...], formats: list[dict[str, Format]]) -> Any:
    """Accuracy, attacks, violations and tightness of one net."""
    means = torch.randn(4, *shape)
    accuracy = trained(net, means)
    model = elasticize(net.eval(), (means[:1],))
    chain = ProfileChain(
        tuple(
            Profile(n, f, 1, 1, 1)
            for n, f in zip(("tiny", "middle", "dense"), formats, strict=True)
        )
    )
    data = [(means[i % 4][None] + 0.7 * torch.randn(1, *shape),) for i in range(64)]
    domains = {
        "max 0.02": Domain.around(data[:1], 0.02),
        "l2 0.1": Domain.around(data[:1], 0.1, "l2"),
        "data box": Domain.of_data(data),
    }
    rows: list[dict[str, Any]] = []
    attacks = 0
    for title, domain in domains.items():
        bounds = {m: sound_bounds(model, chain, domain, mode=m) for m in MODES}
        for profile in chain:
            best = bounds["symbols"][profile.name]
            if best.status == "unavailable":
                rows.append({"domain": title, "profile": profile.name, "reason": best.reason})
                continue
            worst = attack(model, dict(profile.formats), domain.cells[0][0])
            attacks += 2 * STARTS
            raw = {m: found[profile.name].raw for m, found in bounds.items()}
            rows.append(
                {
                    "domain": title,
                    "profile": profile.name,
                    "status": best.status,
                    "largest_drift": worst,
                    "bounds": raw,
                    "tightness": {m: value / worst for m, value in raw.items()},
                    "violations": [m for m, value in raw.items() if worst > value],
                }
            )
    return {"accuracy": accuracy, "attacks": attacks, "rows": rows}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    out = parser.parse_args().out
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = {name: measured(*rest) for name, rest in nets().items()}
    seconds = round(time.perf_counter() - start, 1)
    result = {"command": "python -m benchmarks.sound", "seconds": seconds, "nets": found}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
