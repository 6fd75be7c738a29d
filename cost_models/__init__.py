"""Predict the time of a layer in a format on a target, before anything is compiled."""

from collections.abc import Mapping
from typing import cast

from t3c.core.errors import T3CError
from t3c.core.registry import resolve
from t3c.cost_models.base import AbstractCostModel, Row
from t3c.targets.base import TargetSpec

__all__ = ["COST_MODELS", "AbstractCostModel", "Row", "cost_model"]

COST_MODELS: Mapping[str, str] = {
    "roofline": "t3c.cost_models.roofline:RooflineModel",
    "learned": "t3c.cost_models.learned:LearnedModel",
}
"""Name -> "module:ATTRIBUTE" of an AbstractCostModel."""


def cost_model(spec: TargetSpec, name: str = "roofline") -> AbstractCostModel:
    """The cost model `name` with the constants of a target, before any fit.

    Raises:
        T3CError: Unknown name; the message lists the known ones.
    """
    found = resolve(COST_MODELS, name, "cost model", T3CError)
    return cast(type[AbstractCostModel], found).of(spec)
