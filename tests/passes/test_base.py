from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

from t3c.core.errors import PassError
from t3c.passes.base import AbstractPass, Log, run_passes
from t3c.passes.capture import capture
from t3c.passes.dead_code import DeadCode


@dataclass(frozen=True, slots=True)
class Breaks(AbstractPass):
    name: ClassVar[str] = "breaks"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        raise KeyError("oops")


@dataclass(frozen=True, slots=True)
class Scrambles(AbstractPass):
    name: ClassVar[str] = "scrambles"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        first, last = next(iter(gm.graph.nodes)), list(gm.graph.nodes)[-2]
        last.append(first)


GRAPH = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.randn(2, 4),)).graph


@pytest.mark.parametrize("step", [Breaks(), Scrambles()])
def test_failure_carries_the_name_of_the_pass(step: AbstractPass) -> None:
    with pytest.raises(PassError, match=f"pass '{step.name}' failed"):
        run_passes(GRAPH, [step])


def test_dump_shows_every_stage(tmp_path: Path) -> None:
    run_passes(GRAPH, [DeadCode(), DeadCode()], dump=tmp_path / "graphs")
    files = sorted(p.name for p in (tmp_path / "graphs").iterdir())
    assert files == ["00-dead-code.txt", "01-dead-code.txt"]
    assert "aten.linear" in (tmp_path / "graphs" / files[0]).read_text()
