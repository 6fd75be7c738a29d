import pytest

from t3c.targets._example import RISCV
from t3c.targets.base import TargetSpec
from tests.conformance.target import TargetConformance


class TestExample(TargetConformance):
    @pytest.fixture
    def spec(self) -> TargetSpec:
        return RISCV
