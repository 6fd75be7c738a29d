"""Rounding of weights with error feedback: what one column loses, later columns make up for.

Minimizes tr((W - Q) C (W - Q)^T) greedily, column by column, for the second moment C of the layer's
inputs. Source: Frantar et al., GPTQ (arXiv 2210.17323), in the form with a Cholesky factor of the
inverse. With C = I, and wherever inputs do not correlate, it is plain rounding.

Components of a factorization keep their prefixes: a row of the input-side factor is one component
and is rounded by itself, and the inputs of the output-side factor hardly correlate (their moment is
nearly diagonal by construction), so that one is rounded plainly.
"""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from t3c.core.codes import GROUP, RATIO, Grouped, Matrix, Nested, quantize_groups

DAMPING = 0.01
"""Added to the diagonal of the moment, as a share of its mean (GPTQ's)."""
FINE_WEIGHT = 16.0
"""What a squared error of the 8-bit weights counts against one of the 4-bit weights where nested
codes must choose. MiniLM, drift of the 8- and the 4-bit profile: 0 .037 and .178, 16 .026 and .185
(independent arrays .0195 and .178; with rounded activations .0637 and .194 against .0606 and .187).
"""
CLIPS = tuple(1 - 0.03 * i for i in range(14))
"""Scales that `clipped` tries, as shares of the one that clips nothing."""
NESTED_CLIPS = CLIPS[:5]
"""Those of nested codes, whose 8-bit weights are clipped with the 4-bit ones. MiniLM, rounded
activations, drift in 4 and 8 bits: none .1775 and .0651, to .88 .1668 and .0646, to .79 .1658 and
.0658, all .1663 and .0666."""


@torch.no_grad()
def round_rows(weight: Tensor, moment: Tensor) -> Matrix:
    """8-bit codes, one scale per row as `t3c.core.codes.quantize_weight` chooses it.

    Args:
        weight: [rows, cols].
        moment: [cols, cols], E[x x^T] of the inputs.

    Raises:
        ValueError: The moment does not fit.
    """
    w = weight.detach().float()
    peak = w.abs().amax(1) if w.shape[1] else w.new_zeros(len(w))
    scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
    q = torch.zeros_like(w)
    for at, block, feedback in _blocks(w, moment):
        for j in range(block.shape[1]):
            codes = torch.round(block[:, j] / scale).clamp(-127, 127)
            q[:, at + j] = codes
            feedback(j, codes * scale)
    return Matrix(q.to(torch.int8).numpy(), scale.numpy())


@torch.no_grad()
def round_groups(
    weight: Tensor,
    moment: Tensor,
    *,
    search: bool = False,
    bits: int = 4,
    below_four: bool = False,
) -> Grouped:
    """4-bit codes in groups of 64 columns; the scale of a group fits what feedback made of it.

    Args:
        weight: [rows, cols].
        moment: [cols, cols], E[x x^T] of the inputs.
        search: Whether scales are those of `clipped` instead of `quantize_groups`.
        bits: Of a code; below 4 it is stored in 4 all the same, for studies of what is lost.
        below_four: Whether fewer than 4 bits are meant.

    Raises:
        ValueError: The moment does not fit, or the bits are not 4 and nobody said they are meant.
    """
    _check_bits(bits, below_four)
    least = -(1 << (bits - 1))
    w = weight.detach().float()
    q = torch.zeros_like(w)
    scales = []
    for at, block, feedback in _blocks(w, moment):
        if search or bits < 4:
            scale = clipped(block, feedback.upper.diagonal(), least)
        else:
            scale = torch.from_numpy(quantize_groups(block.numpy()).scale)[:, 0]
        scales.append(scale)
        for j in range(block.shape[1]):
            codes = torch.round(block[:, j] / scale).clamp(least, -least - 1)
            q[:, at + j] = codes
            feedback(j, codes * scale)
    return Grouped(q.to(torch.int8).numpy(), np.ascontiguousarray(torch.stack(scales, 1).numpy()))


@torch.no_grad()
def round_nested(weight: Tensor, moment: Tensor, four: Tensor | None = None) -> Nested:
    """Nested codes, both widths with error feedback of their own.

    Coarse codes follow the weights that 4-bit feedback made, fine codes make up the rest of the
    8-bit ones. Where the two have drifted further apart than a fine code reaches, the coarse code
    is taken whose errors in both widths are the least (`FINE_WEIGHT`).

    Args:
        weight: [rows, cols].
        moment: [cols, cols], E[x x^T] of the inputs.
        four: What the 4-bit codes shall stand for; None: the weight, like those of 8 bits.

    Raises:
        ValueError: The moment does not fit.
    """
    w = weight.detach().float()
    coarse, fine = torch.zeros_like(w), torch.zeros_like(w)
    scales = []
    aim = w if four is None else four.detach().float()
    for at, streams in _streams([aim, w], moment):
        (four, feed_four), (eight, feed_eight) = streams
        scale = clipped(four, feed_four.upper.diagonal(), shares=NESTED_CLIPS)
        scales.append(scale)
        step = scale / RATIO
        for j in range(four.shape[1]):
            c, f = _nest(four[:, j] / scale, eight[:, j] / step)
            coarse[:, at + j], fine[:, at + j] = c, f
            feed_four(j, c * scale)
            feed_eight(j, (RATIO * c + f) * step)
    whole = Grouped(coarse.to(torch.int8).numpy(), np.ascontiguousarray(torch.stack(scales, 1)))
    return Nested(whole, fine.to(torch.int8).numpy())


def _nest(four: Tensor, eight: Tensor) -> tuple[Tensor, Tensor]:
    """Coarse and fine codes of values in steps of each."""
    nearest = torch.round(eight)

    def fine(coarse: Tensor) -> Tensor:
        return (nearest - RATIO * coarse).clamp(-8, 7)

    def error(coarse: Tensor) -> Tensor:
        off = (RATIO * coarse + fine(coarse) - eight) / RATIO
        return (four - coarse).square() + FINE_WEIGHT * off.square()

    wanted = torch.round(four).clamp(-8, 7)
    inside = torch.floor((nearest + RATIO / 2) / RATIO).clamp(-8, 7)
    coarse = torch.where(error(inside) < error(wanted), inside, wanted)
    return coarse, fine(coarse)


def clipped(
    group: Tensor, upper: Tensor, least: int = -8, shares: Sequence[float] = CLIPS
) -> Tensor:
    """Scales of a group, a row each: of `shares` the one that costs least where errors count.

    An error e of column j costs e^2 / u_j^2, as in the rounding itself; ties go to the larger.

    Args:
        group: [rows, up to 64], what feedback made of the weights.
        upper: u, the diagonal of the Cholesky factor of the inverse moment at these columns.
        least: The smallest code; the largest magnitude of a row becomes this one or is clipped.
        shares: Of the scale that clips nothing, largest first.

    Returns:
        [rows] bfloat16 numbers of either sign, in float32; 1 for a row of zeros.
    """
    peak = group.gather(1, group.abs().argmax(1, keepdim=True))[:, 0]
    scale, lowest = torch.ones_like(peak), torch.full_like(peak, float("inf"))
    for share in shares:
        step = (peak * (share / least)).bfloat16().float()
        step = torch.where(step == 0, torch.ones_like(step), step)[:, None]
        codes = torch.round(group / step).clamp(least, -least - 1)
        cost = ((codes * step - group) / upper).square().sum(1)
        better = cost < lowest
        lowest, scale = torch.where(better, cost, lowest), torch.where(better, step[:, 0], scale)
    return scale


def _check_bits(bits: int, below_four: bool) -> None:
    """Refuse widths that are not asked for on purpose."""
    if bits not in (2, 3, 4):
        raise ValueError(f"bits is {bits}; groups have 4, or 2 or 3 with below_four=True")
    if bits < 4 and not below_four:
        raise ValueError(
            f"bits is {bits}: below 4 bits a network loses most of its accuracy and T3C saves no "
            "memory; use 4 with fewer ranks, or say below_four=True"
        )
    if bits < 4:
        warnings.warn(
            f"{bits}-bit codes are stored in 4 bits and lose far more than 4-bit ones",
            stacklevel=3,
        )


class _Feedback:
    """Spreads the error of a column over the columns of its block, and notes it for the rest."""

    def __init__(self, block: Tensor, upper: Tensor) -> None:
        self.block = block
        self.upper = upper
        self.errors = torch.zeros_like(block)

    def __call__(self, j: int, rounded: Tensor) -> None:
        error = (self.block[:, j] - rounded) / self.upper[j, j]
        self.errors[:, j] = error
        if j + 1 < self.block.shape[1]:
            self.block[:, j + 1 :] -= torch.outer(error, self.upper[j, j + 1 :])


def _blocks(weight: Tensor, moment: Tensor) -> Iterator[tuple[int, Tensor, _Feedback]]:
    """(first column, the columns with earlier errors fed in, feedback) of each block of 64."""
    for at, (stream,) in _streams([weight], moment):
        yield at, *stream


def _streams(
    weights: Sequence[Tensor], moment: Tensor
) -> Iterator[tuple[int, list[tuple[Tensor, _Feedback]]]]:
    """(first column, (columns, feedback) of each weight) of each block; each feeds back apart."""
    cols = weights[0].shape[1]
    if moment.shape != (cols, cols):
        raise ValueError(
            f"moment is {tuple(moment.shape)}; need [{cols}, {cols}] for these weights"
        )
    damped = moment.detach().double().clone()
    mean = float(damped.diagonal().mean()) if cols else 0.0
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    rests = [weight.clone() for weight in weights]
    for at in range(0, cols, GROUP):
        end = min(cols, at + GROUP)
        blocks = [rest[:, at:end] for rest in rests]
        made = [(block, _Feedback(block, upper[at:end, at:end])) for block in blocks]
        yield at, made
        for rest, (_, feedback) in zip(rests, made, strict=True):
            rest[:, end:] -= feedback.errors @ upper[at:end, end:]
