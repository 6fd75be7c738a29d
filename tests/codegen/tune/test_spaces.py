"""Every schedule of a family computes the same numbers; the rule is one of them."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from t3c.codegen.kernels.linear_avx2 import Avx2Linear
from t3c.codegen.kernels.linear_sdot import SdotLinear
from t3c.codegen.kernels.linear_vnni import VnniLinear
from t3c.codegen.kernels.schedule import Op, Scheduled
from t3c.codegen.script import read_function
from t3c.codegen.tune.inproc import contestant
from t3c.codegen.tvm_api import make_target, tvm
from t3c.targets import cpu_features

FAMILIES: dict[str, tuple[Scheduled, str, frozenset[str]]] = {
    "x86-vnni": (VnniLinear(), "icelake-server", frozenset({"avx512_vnni"})),
    "x86-avx2": (Avx2Linear(), "x86-64-v3", frozenset({"avx2", "fma"})),
}
OPS = (
    Op.of("dense", m=1, n=33, k=65),
    Op.of("dense", "gelu", m=13, n=95, k=64),
    Op.of("dense", "add", m=50, n=64, k=190),
    Op.of("low_rank", m=13, n=95, k=64, r=16),
    Op.of("low_rank", "gelu,add", m=31, n=48, k=130, r=48),
)
SAMPLE = 4
"""Schedules of each operator that are run: all would take minutes."""


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.key)
@pytest.mark.parametrize("name", FAMILIES)
def test_schedules_differ_in_speed_only(name: str, op: Op) -> None:
    family, mcpu, needs = FAMILIES[name]
    if not needs <= cpu_features():
        pytest.skip(f"needs {', '.join(sorted(needs))} in /proc/cpuinfo")
    target = make_target({"kind": "llvm", "mcpu": mcpu})
    want = run(family, op, target)
    choices = family.schedules(op)
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(choices))[:SAMPLE]:
        got = run(family.with_records({op.key: choices[i]}), op, target)
        np.testing.assert_array_equal(got, want, err_msg=choices[i].text)


def run(family: Scheduled, op: Op, target: Any) -> NDArray[np.generic]:
    kernel = family.kernel(op)
    made = contestant(tvm.IRModule({kernel.name: read_function(kernel.source)}), target)
    rng = np.random.default_rng(0)
    arrays: list[NDArray[np.generic]] = []
    for param in made.params:
        if param.name == "scales":  # the second half of VNNI's are whole numbers
            arrays.append(rng.integers(1, 9, param.shape).astype(np.float32))
        elif param.dtype == "float32":
            arrays.append(rng.standard_normal(param.shape).astype(np.float32))
        else:
            arrays.append(rng.integers(-127, 128, param.shape).astype(param.dtype))
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    made.function(*tensors)
    out: NDArray[np.generic] = tensors[-1].numpy()
    return out


@pytest.mark.parametrize(
    "family", [*(f for f, _, _ in FAMILIES.values()), SdotLinear()], ids=lambda f: f.name
)
@pytest.mark.parametrize("op", [*OPS, Op.of("dense", m=197, n=3072, k=768)], ids=lambda op: op.key)
def test_the_rule_is_a_choice_and_choices_have_names_and_records_of_their_own(
    family: Scheduled, op: Op
) -> None:
    choices = family.schedules(op)
    assert family.default(op) in choices
    assert len({c.text for c in choices}) == len(choices) == len(set(choices))
    assert family.kernel(op).schedule == family.default(op)
    assert family.kernel(op).op == op
