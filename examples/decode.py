"""One step of decoding by a Llama-shaped network: a token's state in, keys and values as tensors.

The key/value cache is an input; the step returns the new token's keys and values, which the host
appends. So every shape is static and nothing is copied but one position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder; the defaults are TinyLlama-1.1B's.

    Attributes:
        width: Features of a token.
        inner: Features inside the feed-forward network.
        heads: Query heads.
        kv_heads: Key and value heads.
        layers: Layers.
        past: Positions in the cache.
    """

    width: int = 2048
    inner: int = 5632
    heads: int = 32
    kv_heads: int = 4
    layers: int = 4
    past: int = 255

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.width // self.heads


class Norm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, width: int) -> None:
        """Weights of one."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """X [..., width], normalized."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [batch, heads, tokens, head_dim]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def repeat(x: Tensor, times: int) -> Tensor:
    """Each head of x [batch, heads, tokens, head_dim] so many times."""
    batch, heads, tokens, features = x.shape
    spread = x[:, :, None].expand(batch, heads, times, tokens, features)
    return spread.reshape(batch, heads * times, tokens, features)


class Layer(nn.Module):
    """Grouped-query attention over the cache, then a gated feed-forward network."""

    def __init__(self, shape: Shape) -> None:
        """Random weights."""
        super().__init__()
        self.shape = shape
        narrow = shape.kv_heads * shape.head_dim
        self.norm_in, self.norm_out = Norm(shape.width), Norm(shape.width)
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k = nn.Linear(shape.width, narrow, bias=False)
        self.v = nn.Linear(shape.width, narrow, bias=False)
        self.o = nn.Linear(shape.width, shape.width, bias=False)
        self.gate = nn.Linear(shape.width, shape.inner, bias=False)
        self.up = nn.Linear(shape.width, shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token: x [1, 1, width], keys and values [1, kv_heads, past, head_dim].

        Returns:
            x, and the token's key and value [1, kv_heads, 1, head_dim].
        """
        s = self.shape
        y = self.norm_in(x)
        q = rotate(self.q(y).view(1, 1, s.heads, s.head_dim).transpose(1, 2), cos, sin)
        key = rotate(self.k(y).view(1, 1, s.kv_heads, s.head_dim).transpose(1, 2), cos, sin)
        value = self.v(y).view(1, 1, s.kv_heads, s.head_dim).transpose(1, 2)
        all_keys, all_values = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        each = s.heads // s.kv_heads
        seen = functional.scaled_dot_product_attention(
            q, repeat(all_keys, each), repeat(all_values, each)
        )
        x = x + self.o(seen.transpose(1, 2).reshape(1, 1, s.width))
        y = self.norm_out(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y)), key, value


class Decoder(nn.Module):
    """Some layers, without embeddings and head."""

    def __init__(self, shape: Shape) -> None:
        """Random weights."""
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """See `Layer.forward`; one key and one value tensor for each layer."""
        new_keys, new_values = [], []
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            x, key, value = layer(x, cos, sin, k, v)
            new_keys.append(key)
            new_values.append(value)
        return x, new_keys, new_values


def tinyllama_step(shape: Shape | None = None) -> tuple[nn.Module, tuple[object, ...]]:
    """TinyLlama-shaped layers with random weights, and the inputs of one step."""
    shape = shape or Shape()
    torch.manual_seed(0)
    model = Decoder(shape).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    angle = shape.past / 10000 ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angle = torch.cat((angle, angle))[None]
    cache = (1, shape.kv_heads, shape.past, shape.head_dim)
    keys, values = (
        [torch.randn(cache, generator=draw) for _ in range(shape.layers)] for _ in range(2)
    )
    x = torch.randn(1, 1, shape.width, generator=draw)
    return model, (x, angle.cos(), angle.sin(), keys, values)
