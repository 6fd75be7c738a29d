"""Small networks whose whole profiles are measured: families of real ones, in several sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

Built = tuple[nn.Module, tuple[Tensor, ...]]


class Mlp(nn.Module):
    """Linear layers with GELU and a residual around each pair."""

    def __init__(self, width: int, depth: int, inner: int) -> None:
        """Random weights."""
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(width, inner) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(inner, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, width] to [rows, width]."""
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(functional.gelu(up(x)))
        return x


class Block(nn.Module):
    """A transformer block with norms before its two halves."""

    def __init__(self, width: int, heads: int) -> None:
        """Random weights."""
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        y = self.first(x)
        split = [
            f(y).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*split)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        y = self.second(x)
        z: Tensor = x + self.down(functional.gelu(self.up(y)))
        return z


class Encoder(nn.Module):
    """Transformer blocks over vectors, a mean and a classifier."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        """Random weights."""
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to [batch, 100]."""
        y: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return y


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Random weights."""
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1)
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """An image to an image."""
        return torch.relu(self.two(torch.relu(self.one(x))) + self.short(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Random weights."""
        super().__init__()
        inner = outputs // 4
        self.one = nn.Conv2d(inputs, inner, 1)
        self.two = nn.Conv2d(inner, inner, 3, stride, 1)
        self.three = nn.Conv2d(inner, outputs, 1)
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """An image to an image."""
        y = torch.relu(self.two(torch.relu(self.one(x))))
        return torch.relu(self.three(y) + self.short(x))


class Residual(nn.Module):
    """A residual network: a first convolution with pooling, stages of blocks, a classifier."""

    def __init__(
        self, block: type[Basic | Bottleneck], width: int, depths: tuple[int, ...]
    ) -> None:
        """Random weights."""
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, 3)
        layers: list[nn.Module] = []
        inputs = width
        for stage, depth in enumerate(depths):
            outputs = (width << stage) * (4 if block is Bottleneck else 1)
            for i in range(depth):
                layers.append(block(inputs, outputs, 2 if stage and not i else 1))
                inputs = outputs
        self.stages, self.head = nn.Sequential(*layers), nn.Linear(inputs, 100)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, height, width] to [batch, 100]."""
        x = functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        y: Tensor = self.head(self.stages(x).mean((2, 3)))
        return y


class Plain(nn.Module):
    """3x3 convolutions with ReLU, pooled between stages, and two linear layers."""

    def __init__(self, width: int, depths: tuple[int, ...]) -> None:
        """Random weights."""
        super().__init__()
        inputs, stages = 3, []
        for stage, depth in enumerate(depths):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, width << stage, 3, 1, 1), nn.ReLU()]
                inputs = width << stage
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        self.stages = nn.Sequential(*stages)
        self.up, self.head = nn.Linear(inputs, 512), nn.Linear(512, 100)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, height, width] to [batch, 100]."""
        y: Tensor = self.head(torch.relu(self.up(self.stages(x).mean((2, 3)))))
        return y


@dataclass(frozen=True, slots=True)
class Network:
    """One network of the zoo.

    Attributes:
        name: Family and sizes.
        make: Gives the model and example inputs.
    """

    name: str
    make: Callable[[], Built]


def _vectors(model: Callable[[], nn.Module], *shape: int) -> Built:
    torch.manual_seed(0)
    return model().eval().requires_grad_(False), (torch.randn(shape),)


def _mlp(rows: int, width: int, depth: int, inner: int) -> Network:
    model = partial(Mlp, width, depth, inner)
    return Network(f"mlp-{rows}x{width}x{inner}-d{depth}", partial(_vectors, model, rows, width))


def _encoder(tokens: int, width: int, heads: int, depth: int, batch: int = 1) -> Network:
    name = f"encoder-{batch}x{tokens}x{width}-d{depth}"
    return Network(
        name, partial(_vectors, partial(Encoder, width, heads, depth), batch, tokens, width)
    )


def _residual(
    block: type[Basic | Bottleneck], width: int, depths: tuple[int, ...], side: int, batch: int = 1
) -> Network:
    name = f"{block.__name__.lower()}-{width}-{'.'.join(map(str, depths))}-{batch}x{side}"
    model = partial(Residual, block, width, depths)
    return Network(name, partial(_vectors, model, batch, 3, side, side))


def _plain(width: int, depths: tuple[int, ...], side: int, batch: int = 1) -> Network:
    name = f"plain-{width}-{'.'.join(map(str, depths))}-{batch}x{side}"
    return Network(name, partial(_vectors, partial(Plain, width, depths), batch, 3, side, side))


NETWORKS: Mapping[str, Network] = {
    n.name: n
    for n in (
        _encoder(128, 384, 12, 2),
        _residual(Basic, 32, (1, 1, 1, 1), 112),
        _mlp(16, 512, 4, 2048),
        _plain(32, (1, 2, 2), 56),
        _encoder(64, 256, 4, 3),
        _residual(Bottleneck, 32, (1, 1, 1), 112),
        _mlp(1, 768, 3, 3072),
        _encoder(197, 192, 3, 2),
        _residual(Basic, 48, (2, 1, 1), 96),
        _plain(48, (1, 1, 2, 2), 64),
        _encoder(32, 512, 8, 2),
        _mlp(64, 384, 4, 1536),
        _residual(Bottleneck, 64, (1, 1), 128),
        _encoder(50, 320, 5, 3, batch=2),
        _plain(64, (2, 2), 40),
        _mlp(4, 1024, 3, 1024),
        _residual(Basic, 64, (1, 1), 80),
        _encoder(16, 768, 12, 1),
        _residual(Bottleneck, 48, (1, 1, 1), 80, batch=2),
        _mlp(128, 256, 6, 1024),
        _plain(24, (1, 1, 1, 1), 96),
        _encoder(100, 448, 7, 1),
        _residual(Basic, 40, (1, 2, 1), 72, batch=2),
        _mlp(32, 640, 2, 2560),
    )
}
"""Name -> network, families in turn, so that a measurement that is cut short has some of each."""
