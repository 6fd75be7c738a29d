"""Rounding of weights with error feedback: what one column loses, later columns make up for.

Minimizes tr((W - Q) C (W - Q)^T) greedily, column by column, for the second moment C of the layer's
inputs. Source: Frantar et al., GPTQ (arXiv 2210.17323), in the form with a Cholesky factor of the
inverse. With C = I, and wherever inputs do not correlate, it is plain rounding.

Components of a factorization keep their prefixes: a row of the input-side factor is one component
and is rounded by itself, and the inputs of the output-side factor hardly correlate (their moment is
nearly diagonal by construction), so that one is rounded plainly.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from t3c.core.codes import GROUP, Grouped, Matrix, quantize_groups

DAMPING = 0.01
"""Added to the diagonal of the moment, as a share of its mean (GPTQ's)."""


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
def round_groups(weight: Tensor, moment: Tensor) -> Grouped:
    """4-bit codes in groups of 64 columns; the scale of a group fits what feedback made of it.

    Args:
        weight: [rows, cols].
        moment: [cols, cols], E[x x^T] of the inputs.

    Raises:
        ValueError: The moment does not fit.
    """
    w = weight.detach().float()
    q = torch.zeros_like(w)
    scales = []
    for at, block, feedback in _blocks(w, moment):
        scale = torch.from_numpy(quantize_groups(block.numpy()).scale)[:, 0]
        scales.append(scale)
        for j in range(block.shape[1]):
            codes = torch.round(block[:, j] / scale).clamp(-8, 7)
            q[:, at + j] = codes
            feedback(j, codes * scale)
    return Grouped(q.to(torch.int8).numpy(), np.ascontiguousarray(torch.stack(scales, 1).numpy()))


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
    cols = weight.shape[1]
    if moment.shape != (cols, cols):
        raise ValueError(
            f"moment is {tuple(moment.shape)}; need [{cols}, {cols}] for these weights"
        )
    damped = moment.detach().double().clone()
    mean = float(damped.diagonal().mean()) if cols else 0.0
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    rest = weight.clone()
    for at in range(0, cols, GROUP):
        end = min(cols, at + GROUP)
        block = rest[:, at:end]
        feedback = _Feedback(block, upper[at:end, at:end])
        yield at, block, feedback
        rest[:, end:] -= feedback.errors @ upper[at:end, end:]
