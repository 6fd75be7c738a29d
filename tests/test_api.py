"""The whole flow on tiny networks: model in, artifact, profiles, budgets, calls, errors."""

import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import t3c
from t3c import api, proof, targets
from t3c.certificate.sound import Domain
from t3c.codegen.build import Built, build
from t3c.core.artifact import Artifact
from t3c.core.formats import Dense, at_most
from t3c.core.profile import Label
from t3c.cost_models.device import this_device
from t3c.cost_models.learned import LearnedModel
from t3c.elastic.shadow import relative
from t3c.targets.base import Roofline
from tests.lowering import Mlp, draw, small

pytestmark = pytest.mark.skipif(
    not targets.cpu_features() & {"sse2"}, reason="target x86 runs on x86-64 only"
)
PLAN_SECONDS = 2.0
CALLS = 3


class Convolutions(nn.Module):
    """Batch norm, a residual, a pool and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(128, 128, 3, padding=1),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 128, 1),
        )
        self.head = nn.Linear(128, 20)

    def forward(self, image: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(image), 2)
        x = torch.relu(x + self.block(x))
        return torch.as_tensor(self.head(x.mean((2, 3))))


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 60, (1, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[:, 12 - seed % 4 :] = 0
    return ids, mask


def convolutions() -> nn.Module:
    net = Convolutions()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that folding can get wrong
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean = torch.randn(128)
            module.running_var = torch.rand(128) + 0.5
    return net


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=16,
    )
    model: nn.Module = transformers.BertModel(config)
    return model


@dataclass(frozen=True)
class Lowered:
    """A model, calls with data, and what `lower` made of it."""

    model: nn.Module
    calls: list[tuple[Tensor, ...]]
    artifact: Artifact
    remarks: list[str]


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "mlp": (Mlp, lambda seed: (draw(seed, 5, 96),)),
    "convolutions": (convolutions, lambda seed: (draw(seed, 1, 3, 36, 36),)),
    "bert": (bert, tokens),
}


@pytest.fixture(scope="module", params=MODELS)
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    make, data = MODELS[request.param]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    calls = [data(seed) for seed in range(1, 5)]
    out = tmp_path_factory.mktemp("api") / request.param
    remarks: list[str] = []
    artifact = t3c.lower(
        model,
        target="x86",
        example_inputs=calls[0],
        out=out,
        calibration=calls,
        profiles=3,
        plan_seconds=PLAN_SECONDS,
        calls=0,  # what is measured decides which profiles stay: not here
        say=remarks.append,
    )
    return Lowered(model, calls, artifact, remarks)


@pytest.fixture(scope="module")
def session(lowered: Lowered) -> t3c.Session:
    return t3c.load(lowered.artifact)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [value]


def test_the_artifact_loads_from_its_folder(lowered: Lowered, session: t3c.Session) -> None:
    again = t3c.load(lowered.artifact.path)
    assert [p.name for p in again.profiles] == [p.name for p in session.profiles]


def test_profiles_ascend_from_tiny_to_max(session: t3c.Session) -> None:
    profiles = session.profiles
    assert len(profiles) > 1
    assert (profiles[0].name, profiles[-1].name) == ("tiny", "max")
    assert session.profile is profiles[-1]
    for less, more in pairwise(profiles):
        assert less.macs <= more.macs
        assert less.storage_bytes <= more.storage_bytes
        assert less.ram_bytes <= more.ram_bytes
        assert (less.latency_ms or 0) <= (more.latency_ms or 0)
        assert all(at_most(f, more.formats[site]) for site, f in less.formats.items())


def test_every_profile_states_its_observed_drift(session: t3c.Session) -> None:
    for profile in session.profiles:
        assert profile.certificate.observed is not None


def test_parity_of_every_profile_is_recorded(lowered: Lowered) -> None:
    stages = lowered.artifact.manifest.stages
    assert stages.built
    assert stages.verified
    assert stages.where == "device"
    for compiled in lowered.artifact.manifest.profiles:
        assert compiled.parity is not None
        assert compiled.parity.relative <= compiled.parity.tolerance == api.TOLERANCE
        assert compiled.parity.inputs == proof.PARITY_INPUTS


def test_every_rewritten_layer_has_a_format(lowered: Lowered, session: t3c.Session) -> None:
    rewritten = {row.where for row in lowered.artifact.manifest.report.of("rewritten")}
    assert len(rewritten) >= 2
    assert rewritten == set(session.profile.formats)


def test_the_largest_profile_stays_near_the_model(lowered: Lowered, session: t3c.Session) -> None:
    session.set_profile("max")
    for call in lowered.calls:
        got, want = leaves(session(*call)), leaves(lowered.model(*call))
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < 0.05


def test_torch_comes_back_where_torch_went_in(lowered: Lowered, session: t3c.Session) -> None:
    want, got = lowered.model(*lowered.calls[0]), session(*lowered.calls[0])
    for a, b in zip(leaves(got), leaves(want), strict=True):
        assert isinstance(a, Tensor)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    if isinstance(want, Mapping):
        assert list(got) == list(want)
        for name in want:
            assert getattr(got, name) is got[name]


def test_numpy_comes_back_where_numpy_went_in(lowered: Lowered, session: t3c.Session) -> None:
    arrays = [x.numpy() for x in lowered.calls[0]]
    got, same = session(*arrays), session(*lowered.calls[0])
    for a, b in zip(leaves(got), leaves(same), strict=True):
        assert isinstance(a, np.ndarray)
        np.testing.assert_array_equal(a, b.numpy())


def test_a_budget_is_a_ceiling(session: t3c.Session) -> None:
    for profile in session.profiles:
        limit = profile.storage_bytes / 1e6
        chosen = session.set_budget(size_mb=limit)
        assert chosen is session.profile
        assert chosen.storage_bytes / 1e6 <= limit
        larger = [p for p in session.profiles if p.macs > chosen.macs]
        assert all(p.storage_bytes / 1e6 > limit for p in larger)
    with pytest.warns(UserWarning, match="the latency of 'max' is predicted, not measured"):
        assert session.set_budget(latency_ms=1e6).name == "max"


def test_a_budget_below_tiny_names_the_smallest(session: t3c.Session) -> None:
    before = session.profile
    smallest = session.profiles[0].storage_bytes / 1e6
    with pytest.raises(t3c.InfeasibleBudget, match="size_mb") as caught:
        session.set_budget(size_mb=smallest / 2)
    assert caught.value.minimum["size_mb"] == pytest.approx(smallest)
    assert session.profile is before


def test_another_batch_size_is_refused_by_name(lowered: Lowered, session: t3c.Session) -> None:
    double = [torch.cat([x, x]) for x in lowered.calls[0]]
    name = lowered.artifact.manifest.inputs[0].name
    with pytest.raises(ValueError, match=rf"'{name}': expected shape"):
        session(*double)


def test_a_switch_copies_nothing(session: t3c.Session) -> None:
    before = session.bytes_copied
    for profile in (*session.profiles, *reversed(session.profiles)):
        session.set_profile(profile.name)
    assert session.bytes_copied == before
    assert session.weight_bytes_copied == 0


def test_run_py_needs_no_t3c(lowered: Lowered, session: t3c.Session, tmp_path: Path) -> None:
    specs = lowered.artifact.manifest.inputs
    arrays: dict[str, Any] = {
        s.name: x.numpy() for s, x in zip(specs, lowered.calls[0], strict=True)
    }
    np.savez(tmp_path / "inputs.npz", **arrays)
    block = "import sys; sys.modules['t3c'] = sys.modules['torch'] = None; "
    script = str(lowered.artifact.path / "run.py")
    code = f"{block}sys.argv[0] = {script!r}; import runpy; runpy.run_path({script!r})"
    done = subprocess.run(
        [sys.executable, "-c", code, session.profiles[0].name, str(tmp_path / "inputs.npz")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    session.set_profile(session.profiles[0].name)
    printed = done.stdout.splitlines()
    assert printed[-1].startswith(f"profile {session.profile.name}: ")
    outputs = leaves(session(*lowered.calls[0]))
    for line, spec, value in zip(printed, lowered.artifact.manifest.outputs, outputs, strict=False):
        assert line.startswith(spec.name)
        assert float(line.split()[-1]) == pytest.approx(float(value.mean()), abs=1e-5)


def test_a_domain_puts_a_proven_bound_of_every_profile_into_the_manifest(tmp_path: Path) -> None:
    ends = torch.full((2, 64), 0.1)
    torch.manual_seed(0)
    first, last = nn.Linear(64, 96), nn.Linear(96, 32)
    with torch.no_grad():  # two classes above the others, some margins above the bound
        first.weight *= 4
        last.weight[:2] *= 4
        last.bias[:2] += torch.tensor([2.0, 1.0])
    model = nn.Sequential(first, nn.ReLU(), last).eval()
    artifact = small(model=model, out=tmp_path / "net", domain=Domain.box(-ends, ends))
    found = [p.profile.certificate.sound for p in artifact.manifest.profiles]
    assert all(s is not None and s.status != "unavailable" and 0 < s.value < 100 for s in found)
    inside = [(ends * (2 * torch.rand(2, 64) - 1),) for _ in range(60)]
    proven = t3c.certify(artifact, model, inside, say=lambda line: None).manifest.profiles[-1]
    assert proven.profile.certificate.labels is not None
    checked = proven.profile.certificate.labels.checked[-1]
    assert (checked.level, checked.flips) == (None, 0.0)
    assert checked.certified > 0


def test_a_file_for_the_damage_table_reaches_the_planner_and_none_does_not(tmp_path: Path) -> None:
    class Planned(Exception):
        pass

    seen: list[dict[str, Any]] = []

    def planner(*_: Any, **options: Any) -> Any:
        seen.append(options)
        raise Planned

    for table in (str(tmp_path / "damage.jsonl"), None):
        with pytest.raises(Planned):
            small(out=tmp_path / "net", planner=planner, table=table)
    assert seen[0]["table"] == tmp_path / "damage.jsonl"
    assert "table" not in seen[1]


def test_an_unknown_target_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(t3c.TargetError, match="unknown target 'sparc'; known are arm") as caught:
        small(target="sparc", out=tmp_path / "net")
    assert all(name in str(caught.value) for name in targets.TARGETS)
    assert not (tmp_path / "net").exists()


def test_missing_example_inputs_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="example_inputs is missing"):
        small(example_inputs=(), out=tmp_path / "net")


@pytest.mark.parametrize("level", ["x86-avx2", "x86-64"])
def test_older_processors_get_libraries_that_run_here(level: str, tmp_path: Path) -> None:
    if not targets.get(level).features <= targets.cpu_features():
        pytest.skip(f"this processor is below {level}")
    manifest = small(target=level, out=tmp_path / "net").manifest
    assert manifest.target.name == level
    assert manifest.stages.verified


def ends(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 1), inner, nn.Linear(1, 64)).eval().requires_grad_(False)


def test_layers_of_one_input_and_one_output_are_lowered(tmp_path: Path) -> None:
    model = ends(nn.Linear(1, 1))
    x = draw(0, 2, 64)
    session = t3c.load(small(model=model, out=tmp_path / "net"))
    assert relative(session(x), model(x)) < 0.05


def test_a_layer_of_zeros_stays_zero(tmp_path: Path) -> None:
    zero = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(zero.weight)
    model = ends(zero)
    x = draw(0, 2, 64)
    session = t3c.load(small(model=model, out=tmp_path / "net"))
    torch.testing.assert_close(session(x), model(x))


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = ends(nn.Linear(1, 1))
    model.get_parameter("1.weight")[0, 0] = float("nan")
    with pytest.raises(t3c.PassError, match="layer '1': its weight holds NaN or infinity"):
        small(model=model, out=tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_a_cost_model_reaches_the_planner_and_a_stale_one_is_refused(tmp_path: Path) -> None:
    class Planned(Exception):
        pass

    seen: list[dict[str, Any]] = []

    def planner(*_: Any, **options: Any) -> Any:
        seen.append(options)
        raise Planned

    spec = targets.get("x86-64")
    model = replace(LearnedModel.of(spec), device=this_device(spec))
    model.save(tmp_path / "model.json")
    for given in ("learned", tmp_path / "model.json", "roofline"):
        with pytest.raises(Planned):
            small(out=tmp_path / "net", target=spec, planner=planner, cost_model=given)
    assert [options.get("model") for options in seen] == [LearnedModel.of(spec), model, None]
    stale = replace(model, device=replace(this_device(spec), cpu="Other"))
    with pytest.raises(t3c.CostModelError, match="stale here: it was measured with cpu 'Other'"):
        small(out=tmp_path / "net", target=spec, planner=planner, cost_model=stale)
    elsewhere = targets.get("arm")
    there = replace(this_device(elsewhere), cpu="Other", features=("asimddp",))
    far = replace(LearnedModel.of(elsewhere), device=there)
    with pytest.raises(Planned):  # of a device that this is not, for that device
        small(out=tmp_path / "net", target=elsewhere, planner=planner, cost_model=far)
    with pytest.raises(t3c.CostModelError, match="stale here: it was measured with target"):
        small(out=tmp_path / "net", target=elsewhere, planner=planner, cost_model=model)
    with pytest.raises(t3c.CostModelError, match="no readable cost model"):
        small(out=tmp_path / "net", cost_model=tmp_path / "none.json")


def test_a_branch_on_values_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Branch(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if input.sum() > 0 else input

    with pytest.raises(t3c.PassError, match="no Python branch on tensor values"):
        small(model=Branch(64, 64).eval(), out=tmp_path / "net")


def test_a_folder_that_is_no_artifact_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(t3c.ArtifactError, match="is no T3C artifact"):
        small(out=tmp_path, example_inputs=())  # told before the model is looked at
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_what_was_assumed_is_said_and_stored(tmp_path: Path) -> None:
    told: list[str] = []
    artifact = small(out=tmp_path / "net", say=told.append)
    assert any("no calibration data" in line for line in told)
    assert artifact.manifest.assumptions == tuple(told)


@pytest.mark.parametrize(("calls", "label"), [(0, Label.PREDICTED), (CALLS, Label.MEASURED)])
def test_times_say_whether_they_were_measured(calls: int, label: Label, tmp_path: Path) -> None:
    for profile in small(out=tmp_path / "net", calls=calls).manifest.chain:
        assert profile.latency is not None
        assert profile.latency.label is label
        assert (profile.latency.calls is None) == (calls == 0)


@contextmanager
def damaged(patch: pytest.MonkeyPatch, harm: Callable[[str, Any], Any]) -> Generator[None]:
    """Every library is built with weights that are not the reference's."""

    def wrong(*args: Any) -> Built:
        built = build(*args)
        return replace(built, tensors={n: harm(n, t) for n, t in built.tensors.items()})

    with patch.context() as scope:
        scope.setattr("t3c.api.build", wrong)
        yield


def off_by_a_little(name: str, tensor: Any) -> Any:
    """Scales and biases 5 % too large."""
    return (tensor * 1.05).astype(tensor.dtype) if tensor.dtype == np.float32 else tensor


def one_block_of_zeros(name: str, tensor: Any) -> Any:
    """The first codes of every int8 tensor lost."""
    if tensor.dtype != np.int8:
        return tensor
    hurt = tensor.copy()
    hurt.reshape(-1)[:512] = 0
    return hurt


@pytest.mark.parametrize("harm", [off_by_a_little, one_block_of_zeros])
def test_a_library_that_computes_something_else_is_never_written(
    harm: Callable[[str, Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with damaged(monkeypatch, harm), pytest.raises(t3c.ParityError, match="relative error"):
        small(out=tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_the_measured_gate_decides(tmp_path: Path) -> None:
    """A target that believes in arithmetic alone expects wins that small layers do not have."""
    hopeful = replace(targets.detect_host(), roofline=Roofline(1e9, 1e12, 1e15, 1e-15, 1e-15, 1e-9))
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48)).eval()
    told: list[str] = []
    manifest = t3c.lower(
        model,
        hopeful,
        (torch.randn(2, 48),),
        tmp_path / "net",
        profiles=3,
        plan_seconds=0.2,
        calls=5,
        say=told.append,
    ).manifest
    rows = {(row.site, row.format): row for row in manifest.gate}
    seen = {key for key, row in rows.items() if row.measured is not None}
    assert {fmt for _, fmt in seen} > {Dense(8)}
    for compiled in manifest.profiles:
        for item in compiled.profile.formats.items():
            assert rows[item].kept
            assert isinstance(item[1], Dense) or item in seen
    lost = [row for row in rows.values() if row.measured is not None and not row.kept]
    assert any("not faster than dense on this machine" in line for line in told) == bool(lost)


def test_a_chain_for_bytes_is_proved_and_runs(tmp_path: Path) -> None:
    artifact = small(
        model=Mlp().eval(),
        example_inputs=(draw(0, 2, 96),),
        out=tmp_path / "net",
        objective="bytes",
        profiles=2,
        calls=0,
    )
    sizes = [c.profile.storage_bytes for c in artifact.manifest.profiles]
    assert sizes == sorted(set(sizes))
    assert {f.bits for f in artifact.manifest.profiles[0].profile.formats.values()} == {4}
    assert artifact.manifest.objective == "bytes"
    session = t3c.load(artifact)
    assert session.set_budget(size_mb=sizes[0] / 1e6).name == "tiny"
    session(draw(0, 2, 96))


def test_an_objective_that_is_unknown_or_that_the_target_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objective is 'speed'; allowed are 'latency'"):
        small(out=tmp_path / "net", objective="speed")
    with pytest.raises(ValueError, match="keep names 'tail', which is no layer's role or path"):
        small(out=tmp_path / "net", keep=["tail"])
    with pytest.raises(ValueError, match="codes is 'shared'; allowed are 'nested', 'independent'"):
        small(out=tmp_path / "net", codes="shared")
    without = replace(
        targets.detect_host(),
        roofline=replace(targets.detect_host().roofline, int4_macs_s=None),
    )
    with pytest.raises(t3c.TargetError, match="objective 'bytes' needs kernels of 4-bit weights"):
        small(out=tmp_path / "net", target=without, objective="bytes")
    assert list(tmp_path.iterdir()) == []


def test_low_ranks_come_from_the_factorizer_that_was_asked_for() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16)).eval()
    x = torch.randn(64, 32) * torch.logspace(-2, 1, 32)
    made = {}
    for name in ("svd", "whitened-svd", "kronecker-svd"):
        elastic = api.elasticize(net, (x,), factorizer=name)
        elastic.set_factors("0", moment=x.T @ x / len(x))
        made[name] = elastic.layers["0"].factor("low")
    assert not torch.allclose(made["svd"], made["whitened-svd"])
    torch.testing.assert_close(made["whitened-svd"], made["kronecker-svd"])  # no gains known
    with pytest.raises(ValueError, match="factorizer is 'qr'; allowed are 'svd', 'whitened-svd'"):
        api.elasticize(net, (x,), factorizer="qr")
