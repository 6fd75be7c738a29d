"""Small models, captured without the export machinery: plain FX graphs with elastic modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from t3c.core.report import ConversionReport
from t3c.core.sites import ConvSite, LinearSite
from t3c.elastic.conv import ElasticConv
from t3c.elastic.linear import ElasticLinear
from t3c.elastic.model import ElasticModel


class Flat:
    """The structure of a model that takes and gives flat tensors."""

    structure: Mapping[str, Any] = {}

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = inputs
        self.names = tuple(f"x{i}" for i in range(len(inputs)))
        self.output_names = ("y",)

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return args

    def unflatten(self, outputs: tuple[Tensor, ...]) -> Any:
        return outputs


def decaying(out: int, fan_in: int, decay: float = 0.9) -> Tensor:
    """A weight whose singular values fall geometrically, as trained ones do."""
    side = min(out, fan_in)
    u, _ = torch.linalg.qr(torch.randn(out, side))
    v, _ = torch.linalg.qr(torch.randn(fan_in, side))
    weight: Tensor = u @ torch.diag(decay ** torch.arange(float(side))) @ v.T
    return weight


def linear(name: str, n: int, k: int, rows: int) -> ElasticLinear:
    return ElasticLinear(LinearSite(name, n, k, rows, True), decaying(n, k), torch.randn(n) * 0.1)


def conv(name: str, out: int, fan_in: int, size: int, stride: int = 1) -> ElasticConv:
    weight = torch.stack([decaying(out, fan_in) for _ in range(9)], -1).reshape(out, fan_in, 3, 3)
    site = ConvSite(
        name,
        out,
        fan_in,
        (3, 3),
        (stride, stride),
        (1, 1),
        (1, 1),
        1,
        (size, size),
        ((size - 1) // stride + 1, (size - 1) // stride + 1),
        True,
    )
    return ElasticConv(site, weight, torch.randn(out) * 0.1)


class Leaf(fx.Tracer):
    """Elastic modules stay calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ElasticLinear | ElasticConv)


def elastic(model: nn.Module, *inputs: Tensor) -> ElasticModel:
    graph = fx.GraphModule(model, Leaf().trace(model))
    return ElasticModel(graph, Flat(inputs), ConversionReport())  # type: ignore[arg-type]


class Mlp(nn.Module):
    def __init__(self, width: int = 64, layers: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.ModuleList(linear(f"fc{i}", width, width, 8) for i in range(layers))
        self.head = linear("head", classes, width, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for layer in self.body:
            x = functional.relu(layer(x)) + x
        return (self.head(x),)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv("stem", 32, 3, 12)
        self.mid = conv("mid", 64, 32, 12, 2)
        self.last = conv("last", 64, 64, 6)
        self.head = linear("head", 10, 64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = functional.relu(self.mid(functional.relu(self.stem(x))))
        x = functional.relu(self.last(x) + x)
        return (self.head(x.mean((2, 3))),)


class Block(nn.Module):
    """A transformer block without its norms; two outputs, one of them integer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(name, width, width, 12) for name in "qkvo")
        self.up = linear("up", 2 * width, width, 12)
        self.down = linear("down", width, 2 * width, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 8
        x = x + self.o(scores.softmax(-1) @ self.v(x))
        x = x + self.down(functional.gelu(self.up(x)))
        return x, x.sum(-1).argmax(-1)


def mlp(batch: int = 8) -> ElasticModel:
    torch.manual_seed(0)
    return elastic(Mlp(), torch.randn(batch, 64))


def cnn() -> ElasticModel:
    torch.manual_seed(1)
    return elastic(Cnn(), torch.randn(1, 3, 12, 12))


def block() -> ElasticModel:
    torch.manual_seed(2)
    return elastic(Block(), torch.randn(1, 12, 64))


def more(model: ElasticModel, count: int, seed: int = 0) -> list[tuple[Tensor, ...]]:
    """Batches in the shapes of the example inputs."""
    torch.manual_seed(seed)
    return [tuple(torch.randn_like(x) for x in model.example_inputs) for _ in range(count)]
