"""Run a lowering graph in torch: the reference that a compiled library is compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from t3c.passes.torch_ops import SITE_CONV, SITE_LINEAR

_STEPS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu-tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Reference(fx.Interpreter):
    """Interpret a lowering graph, with a function for each site."""

    def __init__(self, gm: fx.GraphModule, sites: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Keep the functions beside the graph.

        Args:
            gm: Result of `lowering_graph`.
            sites: Site name -> what it computes, epilogue apart (the elastic modules).
        """
        super().__init__(gm)
        self.sites = sites

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sites and their epilogues here, all else as torch does."""
        if target not in (SITE_LINEAR, SITE_CONV):
            return super().call_function(target, args, kwargs)
        x, residual, site, epilogue, _ = args
        y = self.sites[site](x)
        for step in filter(None, epilogue.split(",")):
            y = y + residual if step == "add" else _STEPS[step](y)
        return y
