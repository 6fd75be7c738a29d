"""A kernel family's schedules as a search space of TVM's own MetaSchedule, ranked by our model.

Our kernels are texts, not traces, so the space of an operator is a stand-in: an empty function
whose root block is annotated with a sampled number, the place of a schedule among the choices of
the family. TVM's search samples, ranks (`RankingModel`), dedupes and stores these; `KernelBuilder`
compiles the kernel that one stands for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.schedule import Op, Schedule, Scheduled
from t3c.codegen.script import read_function
from t3c.codegen.tune.inproc import Builder, Shop
from t3c.codegen.tune.model import Ranking, Sample
from t3c.codegen.tune.records import canonical, choices
from t3c.codegen.tune.trials import stand_in
from t3c.codegen.tvm_api import meta_schedule, tvm
from t3c.core.artifact import write_atomic
from t3c.core.errors import LoweringError

CHOICE = "t3c.choice"
SCHEMA = 1
_builder: Any = meta_schedule.builder
_cost_model: Any = meta_schedule.cost_model
_space: Any = meta_schedule.space_generator
_derived: Any = tvm.ir.utils.derived_object


def tune_context(target: Any, module: Any = None, space: Any = None, strategy: Any = None) -> Any:
    """TVM's context of one task, without the import of every CUDA intrinsic.

    That import is half a minute of TuneContext's own constructor and nothing to a processor.
    """
    make = tvm.get_global_func("s_tir.meta_schedule.TuneContext")
    context = make(module, target, space, strategy, "main", 1, 1, None)
    if space is not None:
        tvm.get_global_func("s_tir.meta_schedule.TuneContextInitialize")(context)
    return context


@dataclass(slots=True)
class Catalogue:
    """Which schedule of which operator a stand-in means.

    Attributes:
        family: The kernel family.
    """

    family: Scheduled
    _choices: dict[Op, dict[str, Schedule]] = field(default_factory=dict)

    def choices(self, op: Op) -> dict[str, Schedule]:
        """The operator's schedules by their canonical text."""
        if op not in self._choices:
            self._choices[op] = choices(self.family, op)
        return self._choices[op]

    def workload(self, op: Op) -> Any:
        """The module that stands for an operator."""
        self.choices(op)  # refuses what the family does not have
        return stand_in({"t3c.op": op.key, "t3c.family": self.family.name})

    def space(self, op: Op) -> Any:
        """Every schedule of the operator, as a space for TVM's search."""
        count = len(self.choices(op))

        def sample(schedule: Any) -> None:
            place = schedule.sample_categorical(list(range(count)), [1 / count] * count)
            schedule.annotate(schedule.get_sblock("root"), CHOICE, place)

        return _space.ScheduleFn(sample, sch_rules=[], postprocs=[], mutator_probs={})

    def candidate(self, op: Op, schedule: Schedule) -> Any:
        """The candidate of the space that means a schedule."""
        place = list(self.choices(op).values()).index(schedule)
        made = tvm.s_tir.Schedule(self.workload(op))
        made.annotate(made.get_sblock("root"), CHOICE, place)
        return meta_schedule.MeasureCandidate(made, [])

    def meaning(self, module: Any) -> tuple[Op, Schedule]:
        """(operator, schedule) of a stand-in.

        Raises:
            LoweringError: It is none of this family.
        """
        (function,) = (f for _, f in module.functions_items())
        notes = function.body.block.annotations if self._mine(function) else {}
        if CHOICE not in notes:
            raise LoweringError(
                f"this module stands for no schedule of {self.family.name!r}; take candidates of "
                "Catalogue.space or Catalogue.candidate of the same family"
            )
        op = Op.parse(str(function.attrs["t3c.op"]))
        return op, list(self.choices(op).values())[int(notes[CHOICE])]

    def _mine(self, function: Any) -> bool:
        attrs = function.attrs
        return "t3c.family" in attrs and str(attrs["t3c.family"]) == self.family.name


@_derived
class RankingModel(_cost_model.PyCostModel):  # type: ignore[misc]
    """`Ranking` as a cost model of TVM's search: scores, higher is better, at random at first."""

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        """An empty model.

        Args:
            catalogue: Says what candidates mean.
            seed: Of the scores before anything was learnt.
        """
        super().__init__()
        self.catalogue = catalogue
        self.rng = np.random.default_rng(seed)
        self.rows: dict[Op, dict[str, float]] = {}
        self.rankings: dict[str, Ranking] = {}

    def update(self, context: Any, candidates: Sequence[Any], results: Sequence[Any]) -> None:
        """Learn measured seconds; see TVM. What failed is left out."""
        del context
        for candidate, result in zip(candidates, results, strict=True):
            if result.run_secs is None:
                continue
            op, schedule = self.catalogue.meaning(candidate.sch.mod)
            seconds = float(np.median([float(s) for s in result.run_secs]))
            self.rows.setdefault(op, {})[canonical(schedule.record())] = seconds
        self._fit()

    def predict(self, context: Any, candidates: Sequence[Any]) -> NDArray[np.float64]:
        """A score for each candidate; see TVM."""
        del context
        meant = [self.catalogue.meaning(c.sch.mod) for c in candidates]
        scores = self.rng.random(len(meant))
        for op in {op for op, _ in meant}:
            ranking = self.rankings.get(op.kind)
            if ranking is not None and ranking.fitted:
                places = [i for i, (other, _) in enumerate(meant) if other == op]
                scores[places] = np.exp(-ranking.predict(op, [meant[i][1] for i in places]))
        return scores

    def save(self, path: str) -> None:
        """Write the measured rows: the model is fitted to them again, to the same trees."""
        rows = [[op.key, name, t] for op, own in self.rows.items() for name, t in own.items()]
        document = {"schema": SCHEMA, "family": self.catalogue.family.name, "rows": rows}
        write_atomic(Path(path), json.dumps(document).encode())

    def load(self, path: str) -> None:
        """Take the rows of a file in place of one's own.

        Raises:
            LoweringError: It holds no rows of this family and version.
        """
        family = self.catalogue.family.name
        rows: dict[Op, dict[str, float]] = {}
        try:
            document = json.loads(Path(path).read_text())
            if (document["schema"], document["family"]) != (SCHEMA, family):
                raise ValueError(f"schema {document['schema']}, family {document['family']!r}")
            for key, name, seconds in document["rows"]:
                op = Op.parse(key)
                if name in self.catalogue.choices(op):
                    rows.setdefault(op, {})[name] = float(seconds)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoweringError(
                f"{path}: no rows of {family!r} in schema {SCHEMA}: {error}; name a file that "
                "save wrote"
            ) from error
        self.rows = rows
        self._fit()

    def _fit(self) -> None:
        """One model for each kind of operator."""
        self.rankings = {}
        for kind in {op.kind for op in self.rows}:
            ranking = self.rankings[kind] = Ranking()
            ranking.fit([s for op, own in self.rows.items() if op.kind == kind
                         for s in self._samples(op, own)])  # fmt: skip

    def _samples(self, op: Op, own: dict[str, float]) -> list[Sample]:
        """Ratios to the rule, or to the median where TVM's search has not measured the rule."""
        rule = canonical(self.catalogue.family.default(op).record())
        base = own[rule] if rule in own else float(np.median(list(own.values())))
        known = self.catalogue.choices(op)
        return [(op, known[name], seconds / base) for name, seconds in own.items()]


@_derived
class KernelBuilder(_builder.PyBuilder):  # type: ignore[misc]
    """Compiles the kernels that stand-ins mean, and keeps them in memory."""

    def __init__(self, catalogue: Catalogue, shop: Shop) -> None:
        """Say what candidates mean, and where to keep what is built."""
        super().__init__()
        self.catalogue = catalogue
        self.shop = shop

    def build(self, inputs: Sequence[Any]) -> list[Any]:
        """See TVM; an error becomes the result of its input."""
        kernels = [_builder.BuilderInput(self._kernel(i.mod), i.target) for i in inputs]
        return list(Builder(self.shop).build(kernels))

    def _kernel(self, stand_in: Any) -> Any:
        op, schedule = self.catalogue.meaning(stand_in)
        kernel = self.catalogue.family.with_records({op.key: schedule}).kernel(op)
        function = read_function(kernel.source).with_attr("tirx.is_scheduled", True)
        return tvm.IRModule({kernel.name: function})
