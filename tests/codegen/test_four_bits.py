"""Profiles with 4-bit linear layers: built, equal to the reference, exact sums, fewer bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from t3c import targets
from t3c.api import elasticize
from t3c.codegen.build import build
from t3c.codegen.exactness import check_accumulators
from t3c.core.errors import LoweringError
from t3c.core.formats import Dense, Format, LowRank
from t3c.core.manifest import TensorSpec
from t3c.elastic.rounding import round_nested
from t3c.passes.pipeline import lowering_graph
from t3c.runtime import tvm_vm
from t3c.runtime.entry import NativeEntry, Scratch
from t3c.runtime.weights import aligned_copy
from t3c.targets.base import TargetSpec

PROFILES: dict[str, dict[str, Format]] = {
    "small": {"up": LowRank(64, 4), "down": LowRank(32, 4), "end": LowRank(32)},
    "middle": {"up": LowRank(128, 4), "down": Dense(4), "end": LowRank(32)},
    "max": {"up": Dense(), "down": Dense(), "end": Dense()},
}


class Net(nn.Module):
    """Three linear layers, two of which share an input's codes with nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.end = nn.Linear(200, 320), nn.Linear(320, 200), nn.Linear(200, 72)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.end(nn.functional.gelu(self.down(self.up(x).relu())) + x))


def host() -> TargetSpec:
    spec = targets.detect_host()
    return targets.get("x86-vnni") if spec.name == "x86-amx" else spec


@pytest.mark.parametrize(("rows", "nested"), [(1, False), (1, True), (20, True)])
def test_four_bit_profiles_equal_their_reference(rows: int, nested: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    elastic = elasticize(Net(), (torch.randn(rows, 200),))
    if nested:
        down = elastic.layers["down"]
        down.set_nested(round_nested(down.weight, torch.eye(320)))
    used = {site: {p[site] for p in PROFILES.values()} for site in elastic.sites}
    codes = {site: elastic.codes(site, formats) for site, formats in used.items()}
    graph = lowering_graph(elastic.graph)
    program = torch.export.export(graph, elastic.example_inputs, strict=False)
    built = build(program, elastic.sites, codes, PROFILES, host())
    built.save(tmp_path / "model.so")
    library = tvm_vm.Library(tmp_path / "model.so", "llvm")
    for name, formats in PROFILES.items():
        made = built.profiles[name]
        weights = [tvm_vm.share(aligned_copy(built.tensors[t])) for t in made.weights]
        out = [TensorSpec("y", (rows, 72), "float32")]
        function = library.native(made.function)
        call = NativeEntry(function, weights, made.arena_bytes or 0, out, Scratch())
        x = tvm_vm.share(aligned_copy(elastic.example_inputs[0].numpy()))
        (y,) = call([x], as_torch=False)
        with elastic.using(formats), torch.inference_mode():
            (want,) = elastic.graph(*elastic.example_inputs)
        # a unit in the last place may turn a rounding of the middle layers
        assert np.linalg.norm(y - want.numpy()) < 5e-3 * np.linalg.norm(want.numpy())
        checks = check_accumulators(elastic.sites, codes, formats, host())
        assert all(check.wrong == 0 for check in checks)
    sizes = [built.profiles[name].storage_bytes for name in PROFILES]
    assert sizes[0] < sizes[1] < 0.6 * sizes[2]
    both = {name for p in ("middle", "max") for name in built.profiles[p].weights if "down" in name}
    shared = set(built.profiles["middle"].weights) & set(built.profiles["max"].weights)
    assert (len(shared & both) == 3) is nested  # coarse codes, scales, bias; fine codes beside them


def test_a_family_without_four_bits_says_so() -> None:
    elastic = elasticize(nn.Linear(64, 64), (torch.randn(1, 64),))
    (site,) = elastic.sites
    program = torch.export.export(
        lowering_graph(elastic.graph), elastic.example_inputs, strict=False
    )
    codes = {site: elastic.codes(site, [Dense(4)])}
    with pytest.raises(LoweringError, match="has no 4-bit kernels; use formats of 8 bits"):
        build(program, elastic.sites, codes, {"max": {site: Dense(4)}}, targets.get("cuda"))
