"""A kernel family whose schedules differ in speed by design."""

from dataclasses import dataclass

from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.schedule import Op, Schedule, Scheduled
from t3c.codegen.tune.machine import Machine

MACHINE = Machine("test 1 2", 32, 1024)
OP = Op.of("count", n=64)


@dataclass(frozen=True, slots=True)
class Rounds(Schedule):
    """How often the same sum is made; one is broken: it reads a loop's variable outside."""

    rounds: int
    broken: int


class CountFamily(Scheduled):
    """y[i] = x[i] + 1, as often as the schedule says; the rule is the slowest but one."""

    name = "count"

    def schedules(self, op: Op) -> tuple[Schedule, ...]:
        if op.kind != "count":
            raise self.unknown(op)
        good = [Rounds(rounds, 0) for rounds in (20, 100, 400, 1000, 4000)]
        return (*good, Rounds(1, 1))

    def default(self, op: Op) -> Schedule:
        return Rounds(1000, 0)

    def kernel(self, op: Op) -> Kernel:
        schedule = self.pick(op)
        assert isinstance(schedule, Rounds)
        n = op["n"]
        name = f"count_{n}{self.suffix(op, schedule)}"
        value = 'T.call_llvm_pure_intrin("float32", "llvm.sqrt", x[i] + r)'
        end = "    y[0] = x[i]\n" if schedule.broken else ""
        source = (
            "@T.prim_func(s_tir=True)\n"
            f'def {name}(x: T.Buffer(({n},), "float32"), y: T.Buffer(({n},), "float32")):\n'
            f'    T.func_attr({{"global_symbol": "{name}"}})\n'
            f"    for r in range({schedule.rounds}):\n"
            f"        for i in range({n}):\n"
            f"            y[i] = {value}\n{end}"
        )
        return Kernel(name, source, (((n,), "float32"),), op, schedule)
