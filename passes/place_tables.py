"""Embedding tables become modules that can be read in int8."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import fx, nn

from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import Key, aten, constant, is_call, key_of, replace
from t3c.passes.sites import MakeTable, readers

LEAST = 1 << 16
"""Elements from which a table is worth it: the others are a few kilobytes."""


@final
@dataclass(frozen=True, slots=True)
class PlaceTables(AbstractPass):
    """Look rows up in a module, for every large float32 table that is only looked up.

    Before: y = embedding(weight, indices)
    After:  y = tables.weight(indices)
    """

    name: ClassVar[str] = "place-tables"
    make: MakeTable | None

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Place one module for each table; nothing without a maker."""
        if self.make is None:
            return
        made: dict[Key, str] = {}
        for key, uses in readers(gm).items():
            weight = constant(gm, uses[0][0]) if uses else None
            looked_up = all(
                is_call(user, aten.embedding.default) and user.args[0] is node
                for node, user in uses
            )
            if weight is None or not looked_up or weight.numel() < LEAST:
                continue
            where = str(uses[0][0].target)
            if weight.dtype != torch.float32 or weight.dim() != 2:
                log.kept(
                    where, "embedding", f"a table of {weight.dtype}; int8 rows are made of float32"
                )
                continue
            if not made:
                gm.add_module("tables", nn.Module())
            made[key] = f"tables.{where.replace('.', '_')}"
            gm.add_submodule(made[key], self.make(weight))
            log.did(
                where, "embedding", f"{weight.shape[0]} rows of {weight.shape[1]}, read in int8"
            )
        for node in list(gm.graph.nodes):
            if is_call(node, aten.embedding.default):
                weight = constant(gm, node.args[0])
                name = None if weight is None else made.get(key_of(weight))
                if name is not None:
                    with gm.graph.inserting_before(node):
                        new = gm.graph.call_module(name, (node.args[1],))
                    new.meta = dict(node.meta)
                    replace(node, new)
