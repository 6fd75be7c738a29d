import pytest

from t3c.core.objective import Mix, Objective, parse_objective


@pytest.mark.parametrize("objective", list(Objective))
def test_every_objective_is_found_by_name_and_has_a_unit(objective: Objective) -> None:
    assert parse_objective(str(objective)) is objective
    assert parse_objective(objective) is objective
    assert objective.unit


def test_several_are_a_mix_whatever_their_order() -> None:
    both = Mix((Objective.LATENCY, Objective.BYTES))
    for text in ("latency+bytes", "bytes+latency", ["bytes", "latency"], both):
        assert parse_objective(text) == both
    assert str(both) == "latency+bytes"
    assert both.unit == "of the dense network's latency+bytes"
    assert parse_objective(["macs"]) is Objective.MACS
    assert Objective.MACS.parts == (Objective.MACS,)


@pytest.mark.parametrize("text", ["latency+speed", "latency+latency", "", "latency+", []])
def test_a_mix_of_what_is_none_or_twice_is_refused(text: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"objective is .* several joined by"):
        parse_objective(text)
    for parts in ((Objective.MACS,), (Objective.BYTES, Objective.LATENCY)):
        with pytest.raises(ValueError, match="mixes nothing"):
            Mix(parts)


def test_another_name_is_refused_with_those_that_there_are() -> None:
    message = "objective is 'speed'; allowed are 'latency', 'macs', 'bytes', 'energy'"
    with pytest.raises(ValueError, match=message):
        parse_objective("speed")
