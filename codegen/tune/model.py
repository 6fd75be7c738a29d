"""Ranks schedules that were not measured, by gradient-boosted trees over those that were."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost
from numpy.typing import NDArray

from t3c.codegen.kernels.schedule import Op, Schedule

LEAST = 24
"""Measurements from which on the model is asked."""
ROUNDS = 120
SETTINGS = {
    "max_depth": 5,
    "eta": 0.15,
    "subsample": 0.8,
    "min_child_weight": 2,
    "nthread": 1,
    "seed": 0,
    "verbosity": 0,
}
Sample = tuple[Op, Schedule, float]
"""Operator, schedule, ratio to the rule."""


def features(op: Op, schedule: Schedule) -> NDArray[np.float32]:
    """Sizes, choices, and how well each choice divides each size."""
    sizes = [value for _, value in op.sizes]
    choices = schedule.record().values()
    numbers = [value for value in choices if isinstance(value, int)]
    words = [float(sum(value.encode()) % 97) for value in choices if isinstance(value, str)]
    fit = [-(-size // n) * n / size if size and n else 1.0 for size in sizes for n in numbers]
    steps = [math.log2(size + 1) for size in sizes]
    area = math.log2(max(1, math.prod(n for n in numbers if n > 0)))
    epilogue = [float("gelu" in op.epilogue), float("add" in op.epilogue)]
    return np.array([*steps, *numbers, *words, *fit, area, *epilogue], np.float32)


@dataclass(slots=True)
class Ranking:
    """The model of one kind of operator of one family."""

    _booster: Any = None

    def fit(self, samples: Sequence[Sample]) -> None:
        """Learn log ratios; nothing where there are too few."""
        if len(samples) < LEAST:
            return
        x = np.stack([features(op, schedule) for op, schedule, _ in samples])
        y = np.log(np.array([min(ratio, 4.0) for *_, ratio in samples], np.float32))
        self._booster = xgboost.train(SETTINGS, xgboost.DMatrix(x, label=y), ROUNDS)

    def order(self, op: Op, names: Sequence[str], choices: Mapping[str, Schedule]) -> list[str]:
        """Names of schedules, the best guess first; none where nothing was learnt."""
        if not self.fitted or not names:
            return []
        predicted = self.predict(op, [choices[name] for name in names])
        return [names[int(i)] for i in np.argsort(predicted, kind="stable")]

    @property
    def fitted(self) -> bool:
        """Whether anything was learnt."""
        return self._booster is not None

    def predict(self, op: Op, schedules: Sequence[Schedule]) -> NDArray[np.float32]:
        """Log ratio of each schedule to the rule; only of a model that is `fitted`."""
        x = np.stack([features(op, schedule) for schedule in schedules])
        predicted: NDArray[np.float32] = self._booster.predict(xgboost.DMatrix(x))
        return predicted
