"""Fused attention equals softmax(q k^T * scale + mask) v at every size, mask and vector width.

In float32 to rounding; in 16-bit codes within 2e-3 of the output's norm.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from t3c.codegen.kernels.attention import attention
from t3c.codegen.kernels.attention_words import SPAN, WordAttention, WordProduct, word_product
from t3c.codegen.kernels.family import Kernel
from t3c.codegen.script import read_function
from t3c.codegen.tvm_api import make_target, tvm
from t3c.targets import cpu_features

Array = NDArray[np.float32]
HOST = make_target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
INFINITY = float("inf")
SMALLEST = float(np.finfo(np.float32).min)
WORDS = [
    pytest.param(
        word_product(frozenset({feature}), lanes),
        marks=pytest.mark.skipif(feature not in cpu_features(), reason=f"no {feature} here"),
        id=feature,
    )
    for lanes, feature in ((16, "avx512_vnni"), (8, "avx2"))
]
NARROW = pytest.param(
    word_product(frozenset({"avx_vnni"}), 8),  # on AVX-512 in its spelling
    marks=pytest.mark.skipif("avx512vl" not in cpu_features(), reason="no 256-bit form here"),
    id="avx_vnni",
)
rng = np.random.default_rng(0)


def compiled(kernel: Kernel, target: Any) -> Any:
    return tvm.compile(tvm.IRModule({kernel.name: read_function(kernel.source)}), target=target)


def normal(*shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def check(
    batch: int,
    heads: int,
    kv_heads: int,
    lengths: tuple[int, int],
    dims: tuple[int, int],
    mask: Array | None = None,
    causal: bool = False,
    lanes: int = 16,
    words: WordProduct | None = None,
    peak: float = 1.0,
) -> Array:
    """Run one kernel and compare with torch in double precision; the output."""
    (s, t), (d, dv) = lengths, dims
    kernel = attention(
        batch,
        heads,
        kv_heads,
        s,
        t,
        d,
        dv,
        d**-0.5,
        None if mask is None else mask.shape,
        causal,
        lanes if words is None else words.lanes,
        words,
    )
    q, k = peak * normal(batch, s, heads * d), normal(batch, t, kv_heads * d)
    v = normal(batch, t, kv_heads * dv)
    out = tvm.runtime.tensor(np.zeros(kernel.outs[0][0], np.float32))
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    compiled(kernel, HOST)[kernel.name](*map(tvm.runtime.tensor, inputs), out)
    got: Array = out.numpy()

    def split(a: Array, n: int) -> torch.Tensor:
        return torch.tensor(a).double().view(batch, a.shape[1], n, -1).transpose(1, 2)

    keys = split(k, kv_heads).repeat_interleave(heads // kv_heads, 1)
    values = split(v, kv_heads).repeat_interleave(heads // kv_heads, 1)
    scores = (split(q, heads) @ keys.transpose(-1, -2) * d**-0.5).float()
    if mask is not None:
        scores = scores + torch.tensor(mask)
    if causal:
        scores = scores.masked_fill(torch.ones(s, t, dtype=torch.bool).triu(1), -INFINITY)
    want = (scores.double().softmax(-1) @ values).transpose(1, 2).flatten(2)
    if words is None:
        np.testing.assert_allclose(got, want.float().numpy(), rtol=2e-5, atol=3e-6, equal_nan=True)
        return got
    assert WordAttention.fits(d, dv, words.lanes)
    assert np.array_equal(np.isnan(got), np.isnan(want.numpy()))
    error = np.nan_to_num(got - want.numpy())
    assert np.linalg.norm(error) <= 2e-3 * np.linalg.norm(np.nan_to_num(want.numpy()))
    return got


def masked(shape: tuple[int, ...], fill: float) -> Array:
    return np.where(rng.random(shape) < 0.3, np.float32(fill), normal(*shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("lengths", "dims", "lanes"),
    [
        ((1, 1), (4, 4), 16),
        ((5, 7), (20, 36), 8),
        ((6, 16), (16, 16), 16),
        ((7, 17), (33, 15), 16),
        ((7, 17), (33, 15), 8),
        ((7, 17), (33, 15), 4),
        ((33, 65), (64, 64), 16),
        ((33, 65), (64, 64), 4),
        ((50, 48), (80, 80), 8),
    ],
)
def test_sizes_around_tiles(lengths: tuple[int, int], dims: tuple[int, int], lanes: int) -> None:
    check(2, 4, 2, lengths, dims, lanes=lanes)


@pytest.mark.parametrize("lengths", [(33, 33), (100, 100), (3, 100), (100, 17)])
def test_causal_sees_only_the_past(lengths: tuple[int, int]) -> None:
    check(1, 2, 1, lengths, (24, 24), causal=True)


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 1, 33), (2, 4, 19, 33), (1, 1, 19, 33), (19, 33), (33,), (2, 1, 19, 1), (1, 1, 1, 1)],
)
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    check(2, 4, 2, (19, 33), (16, 16), masked(shape, SMALLEST))


def test_a_mask_of_whole_vectors() -> None:
    check(2, 4, 2, (19, 32), (16, 16), masked((2, 1, 19, 32), -INFINITY), lanes=8)


def test_a_row_masked_with_infinity_is_nan_as_in_torch() -> None:
    mask = masked((2, 1, 19, 33), -INFINITY)
    mask[1, 0, 3] = -INFINITY
    got = check(2, 4, 2, (19, 33), (16, 16), mask)
    assert np.isnan(got[1, 3]).all()
    assert np.isnan(got).sum() == got.shape[2]


def test_a_row_masked_with_the_smallest_number_is_the_mean() -> None:
    mask = masked((2, 1, 1, 33), SMALLEST)
    mask[1] = SMALLEST
    assert np.isfinite(check(2, 4, 2, (19, 33), (16, 16), mask)).all()


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("lengths", [(1, 1), (6, 16), (7, 17), (33, 65), (7, SPAN + 1), (6, 515)])
def test_words_at_sizes_around_tiles(words: WordProduct, lengths: tuple[int, int]) -> None:
    check(2, 4, 2, lengths, (64, 48), words=words)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("dims", [(32, 16), (96, 80), (128, 128)])
def test_words_of_every_width(words: WordProduct, dims: tuple[int, int]) -> None:
    check(1, 2, 1, (19, 33), dims, words=words)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("lengths", [(33, 33), (300, 300), (3, 100)])
def test_words_that_see_only_the_past(words: WordProduct, lengths: tuple[int, int]) -> None:
    check(1, 2, 1, lengths, (32, 32), causal=True, words=words)


@pytest.mark.parametrize("words", [*WORDS, NARROW])
@pytest.mark.parametrize("shape", [(2, 1, 1, 33), (2, 4, 19, 33), (2, 1, 19, 1)])
def test_words_with_masks(words: WordProduct, shape: tuple[int, ...]) -> None:
    check(2, 4, 2, (19, 33), (32, 32), masked(shape, -1e30), words=words)


@pytest.mark.parametrize("words", WORDS)
def test_words_of_one_sharp_peak(words: WordProduct) -> None:
    check(1, 2, 2, (19, 65), (32, 32), peak=20.0, words=words)


@pytest.mark.parametrize("words", WORDS)
def test_a_row_of_words_masked_with_infinity_is_nan(words: WordProduct) -> None:
    mask = masked((2, 1, 19, 33), -INFINITY)
    mask[1, 0, 3] = -INFINITY
    got = check(2, 4, 2, (19, 33), (32, 32), mask, words=words)
    assert np.isnan(got).sum() == got.shape[2]


@pytest.mark.parametrize("words", WORDS)
def test_queries_of_zero_give_the_mean(words: WordProduct) -> None:
    check(1, 2, 2, (19, 65), (32, 32), peak=0.0, words=words)


def test_heads_of_other_widths_stay_float() -> None:
    words = word_product(frozenset({"avx2"}), 8)
    kernel = attention(1, 2, 2, 20, 20, 40, 40, 0.25, None, False, 8, words)
    assert kernel == attention(1, 2, 2, 20, 20, 40, 40, 0.25, None, False, 8)
    assert word_product(frozenset({"avx2"}), 4) is None


@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize(
    ("heads", "length", "dims"),
    [
        ((2, 2), 1, (16, 16)),
        ((4, 2), 17, (32, 48)),
        ((14, 2), 100, (64, 64)),
        ((5, 1), 64, (16, 80)),
    ],
)
def test_one_query(heads: tuple[int, int], length: int, dims: tuple[int, int], lanes: int) -> None:
    check(2, *heads, (1, length), dims, lanes=lanes)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 48), (2, 4, 1, 48), (1, 4, 1, 1), (48,), (2, 1, 1, 33), (1, 1)]
)
def test_one_query_with_masks(shape: tuple[int, ...]) -> None:
    length = shape[-1] if shape[-1] > 1 else 33
    check(2, 4, 2, (1, length), (16, 16), masked(shape, SMALLEST))


def test_one_query_is_not_packed() -> None:
    assert "attention_row" in attention(1, 2, 2, 1, 50, 16, 16, 0.25, None, False, 16).name
    for odd in (attention(1, 2, 2, 1, 50, 20, 16, 0.25, None, False, 16),
                attention(1, 2, 2, 1, 50, 16, 16, 0.25, (50,), False, 16)):  # fmt: skip
        assert "attention_row" not in odd.name


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of kv_heads 2"):
        attention(1, 3, 2, 4, 4, 8, 8, 1.0, None, False, 16)
    for length in (4, 1):
        with pytest.raises(ValueError, match="does not broadcast"):
            attention(1, 2, 2, length, 16, 16, 16, 1.0, (3, 16), False, 16)


def test_names_tell_all_parameters_apart() -> None:
    base = (1, 2, 2, 4, 5, 8, 8, 0.5, None, False, 16)
    other = (
        (2, *base[1:]),
        (*base[:7], 0.25, *base[8:]),
        (*base[:8], (1, 5), False, 16),
        (*base[:8], (1, 1, 1, 5), False, 16),
        (*base[:9], True, 16),
        (*base[:10], 8),
    )
    names = [attention(*arguments).name for arguments in (base, *other)]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize(
    ("config", "lanes"),
    [
        ({"kind": "llvm", "mcpu": "x86-64-v3", "mtriple": "x86_64-linux-gnu"}, 8),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}, 4),
    ],
)
def test_foreign_targets_compile(config: dict[str, object], lanes: int) -> None:
    kernel = attention(1, 2, 2, 20, 20, 16, 16, 0.25, None, False, lanes)
    compiled(kernel, make_target(config))
