"""What a pass is, and the runner that owns its contract."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import fx

from t3c.core.errors import PassError
from t3c.core.report import Outcome, Row


@dataclass(slots=True)
class Log:
    """One row per candidate of one pass: the user's report, and a test subject.

    Attributes:
        rule: Name of the pass that writes.
        rows: Rows so far, in graph order.
    """

    rule: str
    rows: list[Row] = field(default_factory=list)

    def did(self, where: str, op: str, reason: str) -> None:
        """`where` became elastic."""
        self._add(where, op, "rewritten", reason)

    def kept(self, where: str, op: str, reason: str) -> None:
        """`where` cannot become elastic."""
        self._add(where, op, "kept", reason)

    def skipped(self, where: str, op: str, reason: str) -> None:
        """The user left `where` out."""
        self._add(where, op, "skipped", reason)

    def _add(self, where: str, op: str, outcome: Outcome, reason: str) -> None:
        self.rows.append(Row(where, op, outcome, reason, self.rule))


class AbstractPass(ABC):
    """A rewrite of a flat ATen graph (see capture) that keeps its function.

    Members are frozen dataclasses whose fields are the options. `run` may change the graph and add
    attributes; it must not change a tensor in place: the copy shares them with its origin.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Rewrite `gm`; log every candidate."""


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with an own graph and own containers; tensors and elastic modules are shared."""
    return fx.GraphModule(gm, deepcopy(gm.graph), class_name="T3CGraph")


def run_passes(
    gm: fx.GraphModule, passes: Sequence[AbstractPass], *, dump: Path | None = None
) -> tuple[fx.GraphModule, tuple[Row, ...]]:
    """Run passes in order on a copy.

    Args:
        gm: The graph; never touched.
        passes: What to run.
        dump: Folder for the text of the graph after each pass (``03-rewrite-conv.txt``); None: no.

    Returns:
        The rewritten graph, and the rows of all passes.

    Raises:
        PassError: A pass failed or left a broken graph; the message names it.
    """
    gm = copy_graph(gm)
    rows: list[Row] = []
    for number, step in enumerate(passes):
        log = Log(step.name)
        try:
            step.run(gm, log)
            gm.graph.lint()
            gm.recompile()
        except Exception as error:
            raise PassError(
                f"pass {step.name!r} failed: {type(error).__name__}: {error}. "
                "Exclude the layer at fault, or report this with the model."
            ) from error
        rows += log.rows
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            (dump / f"{number:02d}-{step.name}.txt").write_text(f"{gm.graph}\n")
    return copy_graph(gm), tuple(rows)
