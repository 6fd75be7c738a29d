"""Operators have keys that read back; schedules have names and records."""

from dataclasses import dataclass

import pytest

from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.schedule import Op, Schedule, Scheduled, epilogue_class
from t3c.core.errors import LoweringError


@dataclass(frozen=True, slots=True)
class Tile(Schedule):
    rows: int
    order: str


class Family(Scheduled):
    name = "test"

    def schedules(self, op: Op) -> tuple[Schedule, ...]:
        if op.kind != "dense":
            raise self.unknown(op)
        return tuple(Tile(rows, order) for rows in (1, 2) for order in ("n", "m"))

    def default(self, op: Op) -> Schedule:
        return self.schedules(op)[0]

    def kernel(self, op: Op) -> Kernel:
        return Kernel(f"dense{self.suffix(op, self.pick(op))}", "", (), op, self.pick(op))


OP = Op.of("dense", "gelu,add", m=197, n=768, k=3072)


@pytest.mark.parametrize("op", [OP, Op.of("quantize", m=1, k=64), Op.of("flat")])
def test_keys_read_back(op: Op) -> None:
    assert Op.parse(op.key) == op


@pytest.mark.parametrize("key", ["", "dense m=-1", "dense m=01", "dense  m=1", "dense m=1 a b"])
def test_other_text_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match="is no operator; write its kind"):
        Op.parse(key)


def test_sizes_are_read_by_name() -> None:
    assert (OP.key, OP["k"]) == ("dense m=197 n=768 k=3072 gelu,add", 3072)


def test_epilogues_of_one_cost_share_a_class() -> None:
    assert [epilogue_class(e) for e in ("", "relu", "add,relu", "silu", "tanh,add")] == [
        "", "", "add", "gelu", "gelu,add",
    ]  # fmt: skip


def test_a_record_goes_before_the_rule_and_shows_in_the_name() -> None:
    assert Family({}).kernel(OP).name == "dense"
    tuned = Family({OP.key: Tile(2, "m")})
    assert tuned.kernel(OP) == Kernel("denser2_om", "", (), OP, Tile(2, "m"))
    assert Tile(2, "m").record() == {"rows": 2, "order": "m"}


def test_an_operator_of_another_family_is_refused() -> None:
    with pytest.raises(LoweringError, match="test: no schedules for operator 'norm m=1'"):
        Family({}).schedules(Op.of("norm", m=1))
