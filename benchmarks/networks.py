"""The networks of the suite, and as many different inputs of each as anybody wants."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples import docstrings, models
from examples.models import TOKENS, Built

Inputs = tuple[Tensor, ...]
CALIBRATION = range(100, 104)
"""Numbers of the inputs on which every contestant with fixed ranges is calibrated."""
HELD_OUT = range(4)
"""Numbers of the inputs on which errors are measured; speed on the first."""


@dataclass(frozen=True, slots=True)
class Network:
    """One row of the table.

    Attributes:
        name: For example ``vit_b16``.
        title: As tables print it.
        build: Gives (model, example inputs).
        draw: Number -> inputs of one call; the same number gives the same inputs.
        kind: ``conv``, ``transformer`` or ``decoder``; what peers must know to do their best.
        top1: Whether the last axis of the output is classes.
    """

    name: str
    title: str
    build: Callable[[], Built]
    draw: Callable[[int], Inputs]
    kind: str
    top1: bool = False

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the multiply-adds of our profiles."""
        return (1.0, 0.5, 0.25, 0.125)


def _image(number: int) -> Inputs:
    draw = torch.Generator().manual_seed(1000 + number)
    return (torch.randn(1, 3, 224, 224, generator=draw),)


def _ids(vocabulary: int, *, mask: bool = True) -> Callable[[int], Inputs]:
    def draw(number: int) -> Inputs:
        source = torch.Generator().manual_seed(1000 + number)
        ids = torch.randint(5, vocabulary, (1, TOKENS), generator=source)
        return (ids, torch.ones_like(ids)) if mask else (ids,)

    return draw


def _sentences(number: int) -> Inputs:
    from examples.demo_minilm import _tokenizer

    first, second = docstrings.halves(200)[number]
    found: Inputs = _tokenizer()(f"{first} {second}")
    return found


ALL = {
    n.name: n
    for n in (
        Network("resnet50", "ResNet-50", models.resnet50, _image, "conv", top1=True),
        Network("resnet101", "ResNet-101", models.resnet101, _image, "conv", top1=True),
        Network("vit_b16", "ViT-B/16", models.vit_b16, _image, "transformer", top1=True),
        Network("vit_l16", "ViT-L/16", models.vit_l16, _image, "transformer", top1=True),
        Network("swin_t", "Swin-T", models.swin_t, _image, "transformer", top1=True),
        Network("bert_base", "BERT-base 128", models.bert_base, _ids(30522), "transformer"),
        Network("distilbert", "DistilBERT 128", models.distilbert, _ids(30522), "transformer"),
        Network("roberta", "RoBERTa-base 128", models.roberta, _ids(50265), "transformer"),
        Network("minilm", "MiniLM 128 (trained)", models.minilm, _sentences, "transformer"),
        Network(
            "tinyllama_4",
            "TinyLlama, 4 blocks, prefill 128",
            models.tinyllama_4,
            _ids(32000, mask=False),
            "decoder",
        ),
    )
}


class FirstOutput(nn.Module):
    """The network as a function of plain tensors to its first output."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap."""
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        """Run."""
        return first(self.model(*args))


def first(result: Any) -> Any:
    """The first output, whatever the structure."""
    while not isinstance(result, Tensor) and not hasattr(result, "dtype"):
        result = next(iter(result.values())) if hasattr(result, "values") else result[0]
    return result
