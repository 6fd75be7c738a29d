"""Outputs of models as drift sees them: the floats, input by input."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

Batch = tuple[Tensor, ...]
F64 = NDArray[np.float64]


def float_outputs(result: Any) -> list[Tensor]:
    """The floating-point tensors of a result, in order."""
    leaves = pytree.tree_leaves(result)
    return [y.float() for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]


def samples_in(batch: Batch, outputs: list[Tensor]) -> int:
    """Inputs in a batch: the common first axis of inputs and outputs, else 1."""
    first = batch[0].shape[0] if batch and batch[0].dim() else 1
    return first if all(y.dim() > 0 and y.shape[0] == first for y in outputs) else 1


def norms(outputs: list[Tensor], samples: int) -> F64:
    """L2 norm of all outputs together, for each input: [samples]."""
    flat = torch.cat([y.reshape(samples, -1).double() for y in outputs], dim=1)
    found: F64 = flat.norm(dim=1).numpy()
    return found


def is_scores(outputs: list[Tensor], samples: int) -> bool:
    """Whether the outputs are one tensor [samples, classes]."""
    if len(outputs) != 1:
        return False
    y = outputs[0]
    return y.dim() == 2 and y.shape[0] == samples and y.shape[1] > 1
