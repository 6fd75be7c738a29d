"""Invented measurements: a device whose layers follow a known law, with noise."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from t3c.core.formats import Dense
from t3c.core.sites import LinearSite
from t3c.cost_models.base import Row, Work
from t3c.cost_models.dataset import Dataset, KernelRow, ProfileRow, Sample
from t3c.cost_models.design import design
from t3c.cost_models.device import Device
from t3c.cost_models.roofline import RooflineModel
from t3c.targets.x86 import VNNI

DEVICE = Device("Invented 1/2/3", ("avx2",), "icelake-server", 1, {"t3c": "1", "apache-tvm": "2"})


def true_seconds(row: Row) -> float:
    """The law: a roofline with constants of its own, and a bend that it does not know."""
    c = replace(VNNI.roofline, int8_macs_s=9e10, call_s=3e-6, bytes_s=2e10)
    (seconds,) = RooflineModel(c).predict([row])
    return seconds * (1 + 0.4 * math.tanh(math.log10(row.site.macs(row.format)) - 7))


def sample(seconds: float) -> Sample:
    return Sample(seconds, 1.1 * seconds, 1.2 * seconds, 20)


def kernels(count: int, noise: float = 0.03, seed: int = 0) -> list[KernelRow]:
    rng = np.random.default_rng(seed)
    return [
        KernelRow(row, sample(true_seconds(row) * math.exp(noise * rng.standard_normal())), 8, g)
        for row, g in design(count, VNNI.rank_step, seed=seed)
    ]


def profiles(networks: int, noise: float = 0.02) -> list[ProfileRow]:
    rng = np.random.default_rng(1)
    found = []
    for i in range(networks):
        layers = [Row(LinearSite("", 64 * j, 128, 8 + i, True), Dense(8)) for j in range(1, 4 + i)]
        rest = Work(1000 * i, 5000 * i, i)
        inside = math.fsum(map(true_seconds, layers))
        seconds = 1.1 * inside + 2e-6 * i + 1e-9 * 5000 * i + 5e-6
        seconds *= math.exp(noise * rng.standard_normal())
        found.append(ProfileRow(f"net{i}", "dense", tuple(layers), rest, sample(seconds), inside))
    return found


def dataset(path: Path, count: int = 200, networks: int = 8) -> Dataset:
    made = Dataset.open(path, DEVICE, print)
    made.append([*kernels(count), *profiles(networks)], DEVICE)
    return made
