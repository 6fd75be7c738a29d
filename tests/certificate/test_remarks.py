"""Remarks: where bounds promise nothing, and where averages hide changed answers."""

from dataclasses import replace

from t3c.certificate.calibrated import calibrate, with_shifted
from t3c.certificate.remarks import on_bounds, on_labels
from t3c.core.certificate import Labels
from tests.certificate.test_calibrated import lognormal

PLAIN = Labels(1000, 0.04, 0.04, 0.001, 0.9, 0.901, 0.1, 0.1, (), ())


def test_shifted_data_are_judged_with_their_figure() -> None:
    found = calibrate({"max": lognormal(0, 500)}, {"max": lognormal(0, 500)}, "", (0.9,))
    assert len(on_bounds(found, (0.9,))) == 1
    alike = with_shifted(found, {"max": lognormal(1, 300)}, "")
    assert on_bounds(alike, (0.9,))[1].endswith("by profile: within error")
    other = with_shifted(found, {"max": 2 * lognormal(1, 300)}, "")
    line = on_bounds(other, (0.9,))[1]
    assert "on the 300 shifted inputs the bounds of 90% cover 7" in line
    assert line.endswith("they do not hold there")


def test_a_level_without_enough_inputs_is_told() -> None:
    found = calibrate({"max": lognormal(0, 20)}, {"max": lognormal(0, 20)}, "")
    assert any(
        "no finite bound at 0.99: it needs at least 99" in s for s in on_bounds(found, (0.99,))
    )


def test_many_flips_at_a_flat_average_are_told() -> None:
    (first, line) = on_labels({"tiny": PLAIN}, 5)
    assert first == "outputs are read as scores of 5 classes"
    assert line == (
        "profile 'tiny' changes 4.0% of labels while accuracy moves by -0.10 points: equal "
        "averages hide changed answers"
    )
    assert len(on_labels({"tiny": replace(PLAIN, accuracy=0.87)}, 5)) == 1  # the average tells
    assert len(on_labels({"tiny": replace(PLAIN, flips=0.01)}, 5)) == 1  # few
    blind = replace(PLAIN, accuracy=None, original_accuracy=None)
    assert "mean confidence moves by +0.10" in on_labels({"tiny": blind}, 5)[1]
