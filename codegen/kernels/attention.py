"""Fused attention: softmax(q k^T * scale + mask) v; scores never leave the cache."""

from t3c.codegen.kernels.attention_float import FloatAttention
from t3c.codegen.kernels.attention_frame import AttentionShape
from t3c.codegen.kernels.attention_row import RowAttention
from t3c.codegen.kernels.attention_words import WordAttention, WordProduct
from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.vectors import Vectors


def attention(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    value_dim: int,
    scale: float,
    mask: tuple[int, ...] | None,
    causal: bool,
    lanes: int,
    words: WordProduct | None = None,
) -> Kernel:
    """(q [B,S,heads*D], k [B,T,kv*D], v [B,T,kv*Dv], [mask f32]) -> [B,S,heads*Dv], all float32.

    Args:
        batch: B.
        heads: Query heads.
        kv_heads: Key and value heads; head h uses h // (heads // kv_heads).
        q_len: S.
        kv_len: T.
        head_dim: D.
        value_dim: Dv.
        scale: Factor of the scores, before the mask is added.
        mask: Shape of the additive mask, broadcastable to [B, heads, S, T]; None: no mask.
        causal: Query i sees keys 0..i only.
        lanes: Float32 lanes of a vector: 16, 8 or 4.
        words: Multiplies 16-bit codes where the sizes allow; None: float32 everywhere.

    Raises:
        ValueError: The mask does not broadcast, or heads do not share keys evenly.
    """
    shape = AttentionShape(batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim)
    shape.check(mask)
    if RowAttention.fits(shape, mask, causal, lanes):
        return RowAttention(shape, scale, mask, Vectors(lanes)).kernel()
    if words is not None and WordAttention.fits(head_dim, value_dim, lanes):
        return WordAttention(shape, scale, mask, causal, Vectors(lanes), words).kernel()
    return FloatAttention(shape, scale, mask, causal, Vectors(lanes)).kernel()
