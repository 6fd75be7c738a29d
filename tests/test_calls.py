"""Calibration calls are checked by place and name before anything is done with them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from t3c import targets
from tests.lowering import draw, small

pytestmark = pytest.mark.skipif(
    not targets.cpu_features() & {"sse2"}, reason="target x86 runs on x86-64 only"
)


def test_an_empty_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calibration is empty"):
        small(calibration=[], out=tmp_path / "net")


def test_a_bare_tensor_as_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"calibration\[0\] is a Tensor; write \(x,\)"):
        small(calibration=[draw(1, 2, 64)], out=tmp_path / "net")


NAN, INF = (torch.full((2, 64), value) for value in (float("nan"), float("inf")))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ((NAN,), r"calibration\[1\]: input '\w+' holds NaN or infinity; leave that call out"),
        ((INF,), r"calibration\[1\]: input '\w+' holds NaN or infinity"),
        ((torch.zeros(3, 64),), r"calibration\[1\]: .*\(3, 64\).*shapes are static: pad"),
        ((torch.zeros(2, 64).double(),), r"calibration\[1\]: .*convert it with .to\(torch.float32"),
        ((NAN, NAN), r"calibration\[1\]: the call has 2 value\(s\), captured were 1"),
    ],
)
def test_bad_calibration_is_refused_by_place_and_name(
    call: tuple[Tensor, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        small(out=tmp_path / "net", calibration=[(draw(0, 2, 64),), call])
    assert not (tmp_path / "net").exists()


def test_one_calibration_call_is_enough_and_told(tmp_path: Path) -> None:
    told: list[str] = []
    small(out=tmp_path / "net", calibration=[(draw(0, 2, 64),)], say=told.append)
    assert any("one calibration batch" in line for line in told)
