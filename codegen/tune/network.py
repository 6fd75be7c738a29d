"""Tuning of one network: which operators its profiles call, and how often."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from t3c.codegen.expand import ProfileBuilder
from t3c.codegen.families import families_of, scheduled, tuned_schedules
from t3c.codegen.import_graph import import_program
from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.schedule import Op, Schedule
from t3c.codegen.script import read_function
from t3c.codegen.tune.machine import this_machine
from t3c.codegen.tune.search import RECORDS, Progress, Task, Tuner
from t3c.codegen.tvm_api import make_target
from t3c.codegen.weights import Families, WeightStore
from t3c.core.codes import SiteCodes
from t3c.core.errors import LoweringError
from t3c.core.formats import Format
from t3c.core.sites import Site
from t3c.targets.base import TargetSpec


class _Calls(ProfileBuilder):
    """Counts the operators of profiles and makes no kernels."""

    def __init__(self, skeleton: Any, store: WeightStore) -> None:
        super().__init__(skeleton, store)
        self.ops: Counter[Op] = Counter()

    def kernel(self, kernel: Kernel) -> Any:
        """An empty function that stands for the kernel."""
        if kernel.op is not None:
            self.ops[kernel.op] += 1
        if kernel.name not in self.kernels:
            empty = read_function(
                f"@T.prim_func(s_tir=True)\ndef {kernel.name}():\n    T.evaluate(0)\n"
            )
            self.kernels[kernel.name] = self.builder.add_func(empty, kernel.name)
        return self.kernels[kernel.name]


def operators(
    program: torch.export.ExportedProgram,
    sites: Mapping[str, Site],
    codes: Mapping[str, SiteCodes],
    profiles: Mapping[str, Mapping[str, Format]],
    spec: TargetSpec,
) -> dict[Op, int]:
    """The operators that have schedules, and how often all profiles together call them.

    Args: see `t3c.codegen.build.build`.
    """
    skeleton = import_program(program, spec)
    calls = _Calls(skeleton, WeightStore(sites, codes, families_of(spec)))
    for name, formats in profiles.items():
        calls.add(f"profile_{name}", formats)
    return dict(calls.ops)


def tune(
    ops: Mapping[Op, int],
    spec: TargetSpec,
    folder: Path,
    minutes: float,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Schedule]:
    """Search for better schedules, on this machine and with as many threads as TVM has.

    Args:
        ops: Operator -> how often it is called.
        spec: A target that this machine can run.
        folder: Of trials and records; a search that was killed goes on from there.
        minutes: How long, about.
        progress: Called with (what, seconds done, seconds in all).
        say: Told what was repaired or skipped.

    Returns:
        Key of an operator -> schedule, all records of the folder.
    """
    records = folder / RECORDS
    known: dict[str, Schedule] = {}
    if records.exists():
        known, skipped = tuned_schedules(spec, records)
        for note in skipped:
            say(note)
    families = families_of(spec, known)
    target = make_target({"kind": spec.kind, "mcpu": spec.mcpu})
    tasks = [Task(_owner(families, op), op, calls) for op, calls in ops.items()]
    Tuner(target, this_machine(), folder, say).run(tasks, minutes, progress)
    return tuned_schedules(spec, records)[0] if records.exists() else {}


def _owner(families: Families, op: Op) -> Any:
    """The family whose operator it is."""
    for family in scheduled(families):
        try:
            family.schedules(op)
        except LoweringError:
            continue
        return family
    raise LoweringError(f"no kernel family has schedules for operator {op.key!r}")
