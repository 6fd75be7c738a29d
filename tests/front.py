"""Capture, rewrite and wrap, as t3c.api composes them."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from t3c.elastic.conv import ElasticConv
from t3c.elastic.linear import ElasticLinear
from t3c.elastic.model import ElasticModel
from t3c.elastic.snap import Snap
from t3c.passes.capture import capture
from t3c.passes.pipeline import rewrite
from t3c.passes.sites import Choice, Makers


def elasticize(
    model: nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: dict[str, Any] | None = None,
    *,
    include: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
    conv: str = "tucker2",
    dump: Path | None = None,
) -> ElasticModel:
    captured = capture(model, example_inputs, example_kwargs)
    makers = Makers(
        linear=ElasticLinear,
        conv=lambda site, w, b: ElasticConv(site, w, b, conv),
        snap=Snap,
    )
    graph, report = rewrite(captured.graph, makers, Choice(include, exclude), dump=dump)
    return ElasticModel(graph, captured, report)
