"""Schedules for everything that is not an elastic layer: the first rule that answers wins.

TVM's stock pipeline for CPUs leaves naive loops. Here every fused function is read as blocks
(`program`), and a rule writes vectorized, threaded loops for them.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from t3c.codegen.rules import block_by_block, products, rows
from t3c.codegen.rules.program import Program, read
from t3c.codegen.tvm_api import tvm
from t3c.targets.base import TargetSpec

__all__ = ["RULES", "schedule", "schedule_module"]

log = logging.getLogger(__name__)
Rule = Callable[[Program, TargetSpec], Any]
"""The scheduled function, or None: not mine."""
RULES: tuple[Rule, ...] = (products.schedule, rows.schedule, block_by_block.schedule)


def schedule_module(mod: Any, spec: TargetSpec) -> Any:
    """Give every function without the attribute ``tirx.is_scheduled`` a CPU schedule.

    Args:
        mod: Module after LegalizeOps, FuseOps and FuseTIR.
        spec: The target; its vector width sets the vectors.
    """
    made = {}
    for var, func in mod.functions_items():
        if isinstance(func, tvm.tirx.PrimFunc) and "tirx.is_scheduled" not in (func.attrs or {}):
            func = schedule(func, spec, var.name_hint)
        made[var] = func
    return tvm.IRModule(made, mod.attrs, mod.global_infos)


def schedule(
    func: Any, spec: TargetSpec, name: str = "function", rules: Sequence[Rule] = RULES
) -> Any:
    """The function as the first rule that takes it writes it.

    A function that is no list of plain assignments (argmax, scatter) stays as it is.
    """
    program = read(func)
    if program is None:
        log.info("%s is left as it is: not a list of plain assignments", name)
        return func.with_attr("tirx.is_scheduled", True)
    for rule in rules:
        try:
            found = rule(program, spec)
        except (RuntimeError, ValueError, TypeError) as error:  # TVM's are RuntimeErrors
            log.warning("%s failed on %s, trying the next rule: %s", rule.__module__, name, error)
            continue
        if found is not None:
            log.debug("%s takes %s", rule.__module__, name)
            return found
    return func.with_attr("tirx.is_scheduled", True)
