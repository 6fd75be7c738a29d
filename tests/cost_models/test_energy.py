import pytest

from t3c.cost_models.base import Work
from t3c.cost_models.energy import EnergyModel


def test_a_layer_costs_its_products_and_its_weights() -> None:
    model = EnergyModel(int8_mac_j=2.0, f32_mac_j=0.0, weight_byte_j=10.0, moved_byte_j=0.0)
    assert model.site(macs=7, weight_bytes=3) == 7 * 2 + 3 * 10


def test_lookup_tables_do_not_count_as_moved() -> None:
    model = EnergyModel(f32_mac_j=3.0, moved_byte_j=1.0)
    assert model.rest(Work(f32_macs=2, bytes_moved=100), parameter_bytes=90) == 2 * 3 + 10
    assert model.rest(Work(f32_macs=0, bytes_moved=80), parameter_bytes=90) == 0


def test_constants_are_those_of_the_table_in_picojoules() -> None:
    model = EnergyModel()
    assert model.int8_mac_j == pytest.approx((0.2 + 0.1) * 1e-12)
    assert model.f32_mac_j == pytest.approx((3.7 + 0.9) * 1e-12)
    assert model.weight_byte_j > model.moved_byte_j > model.f32_mac_j > model.int8_mac_j
