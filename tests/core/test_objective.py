import pytest

from t3c.core.objective import Objective, parse_objective


@pytest.mark.parametrize("objective", list(Objective))
def test_every_objective_is_found_by_name_and_has_a_unit(objective: Objective) -> None:
    assert parse_objective(str(objective)) is objective
    assert parse_objective(objective) is objective
    assert objective.unit


def test_another_name_is_refused_with_those_that_there_are() -> None:
    message = "objective is 'speed'; allowed are 'latency', 'macs', 'bytes', 'energy'"
    with pytest.raises(ValueError, match=message):
        parse_objective("speed")
