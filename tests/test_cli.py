"""The command line: results, one-line errors, and every exit code."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from t3c import cli
from t3c.core.artifact import Artifact
from t3c.core.errors import (
    ArtifactError,
    InfeasibleBudget,
    LoweringError,
    ParityError,
    T3CError,
    TargetError,
)
from t3c.core.manifest import Manifest, TargetInfo
from t3c.core.profile import Label, Timing
from t3c.cost_models.dataset import Dataset, Joules, KernelEnergy
from t3c.cost_models.learned import LearnedModel
from t3c.runtime import record
from t3c.runtime.policy import keep
from t3c.targets.x86 import VNNI
from tests.cost_models.measured import DEVICE, dataset, kernels
from tests.runtime import toy
from tests.runtime.test_policy import policy


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return toy.write(tmp_path_factory.mktemp("toy") / "artifact")


def call(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


@pytest.mark.parametrize(
    "command",
    [(), *((name,) for name in ("lower", "run", "plan", "certify", "inspect", "bench", "doctor"))],
)
def test_help_documents_the_exit_codes(command: tuple[str, ...]) -> None:
    done = call(*command, "--help")
    assert done.exit_code == 0
    assert "3 no profile fits the budget" in " ".join(done.stdout.split())


def test_inspect_shows_profiles_layers_and_report(artifact: Artifact) -> None:
    done = call("inspect", artifact.path, "--layers")
    assert done.exit_code == 0
    for text in ("tiny", "lowrank-r8-int8", "rank up to 16", "assumed bits: 8", "2 (estimated)"):
        assert text in done.stdout
    quiet = call("inspect", artifact.path, "--quiet")
    assert "assumed" not in quiet.stdout


def test_inspect_draws_drift(artifact: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra: plot)")
    done = call("inspect", artifact.path, "--plot", tmp_path / "p.svg")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "p.svg").stat().st_size > 1000


def test_inspect_as_json_is_the_manifest(artifact: Artifact) -> None:
    done = call("inspect", artifact.path, "--json")
    assert Manifest.from_json(json.loads(done.stdout)) == artifact.manifest


def test_run_picks_a_profile_and_writes_outputs(artifact: Artifact, tmp_path: Path) -> None:
    x = toy.inputs()
    np.savez(tmp_path / "x.npz", x=x)
    options = ("--inputs", tmp_path / "x.npz", "--outputs", tmp_path / "y.npz")
    done = call("run", artifact.path, "--latency-ms", 1.5, *options, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["profile"] == "tiny"
    stored = np.load(tmp_path / "y.npz")
    np.testing.assert_allclose(stored["logits"], toy.expected("tiny", x), rtol=1e-4, atol=1e-4)
    text = call("run", artifact.path, "--profile", "max")
    assert "profile max: " in text.stdout
    assert "invented ones" in text.stderr
    assert "invented" not in call("run", artifact.path, "--quiet").stderr


def test_run_governs_for_some_time_and_writes_metrics(artifact: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "metrics.prom"
    options = ("--latency-ms", 1e4, "--govern", 0.05, "--quiet")
    done = call("run", artifact.path, *options, "--metrics", file, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["calls"] == found["profiles"]["max"]["calls"] > 0
    assert found["percentile"] == 95.0
    assert f't3c_governor_calls_total{{profile="max"}} {found["calls"]}' in file.read_text()
    assert "0 of " in call("run", artifact.path, *options).stdout


@pytest.mark.parametrize(
    ("options", "match", "code"),
    [
        (("--metrics", "x"), "goes with --govern", 2),
        (("--govern", 1, "-p", "max"), "takes a budget", 2),
        (("--govern", 1), "govern needs latency_ms", 2),
        (("--govern", 0, "--latency-ms", 9), "positive number of seconds", 2),
        (("--govern", 1, "--latency-ms", 9, "--percentile", 100), "50 to below 100", 2),
        (("--govern", 1, "--latency-ms", 0.1), "smallest feasible budget", 3),
    ],
)
def test_run_refuses_what_cannot_be_governed(
    artifact: Artifact, options: tuple[object, ...], match: str, code: int
) -> None:
    done = call("run", artifact.path, *options)
    assert done.exit_code == code
    assert match in done.stderr


def test_plan_explains_what_binds(artifact: Artifact) -> None:
    done = call("plan", artifact.path, "--latency-ms", 1.5, "--size-mb", 1, "--explain")
    assert done.exit_code == 0
    assert "'tiny', not 'max', because of latency_ms=1.5 (it has 2)" in done.stdout
    found = json.loads(
        call(
            "plan", artifact.path, "--latency-ms", 1.5, "--size-mb", 1, "--explain", "--json"
        ).stdout
    )["explanation"]
    assert (found["profile"], found["binding"]) == ("tiny", ["latency_ms"])
    refused = call("plan", artifact.path, "--latency-ms", 0.1, "--ram-mb", 1, "--explain")
    assert refused.exit_code == 3
    assert "smallest feasible" in refused.stdout
    assert "fails" in refused.stdout


def test_bench_records_in_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = toy.write(tmp_path / "a")

    def measured(*args: object, **more: object) -> record.Run:
        return record.Run({"seconds": {n: [5e-3] * 20 for n in toy.NAMES}, "threads": 1})

    monkeypatch.setattr(record, "samples", measured)
    done = call("bench", own.path, "--record", "--json", "-q")
    assert done.exit_code == 0, done.stderr
    kept = Artifact.read(own.path).manifest.chain
    assert [p.latency_ms for p in kept] == pytest.approx([5.0, 5.0])


def test_bench_times_every_profile(artifact: Artifact) -> None:
    done = call("bench", artifact.path, "--calls", 5, "--warmup", 1, "--json", "-q")
    rows = json.loads(done.stdout)["profiles"]
    assert [(row["profile"], row["calls"], row["label"]) for row in rows] == [
        ("tiny", 5, "measured"),
        ("max", 5, "measured"),
    ]
    assert all(0 < row["fastest_s"] <= row["p50_s"] <= row["p90_s"] <= row["p95_s"] for row in rows)
    assert "of last" in call("bench", artifact.path, "--calls", 2).stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--profile", "huge"), 2, "no profile 'huge'; there are tiny, max"),
        (("--profile", "max", "--size-mb", 3), 2, "exclude each other"),
        (("--latency-ms", 0), 2, "latency_ms is 0.0"),
        (("--latency-ms", 0.1), 3, "latency_ms=1"),
        (("--inputs", "gone.npz"), 2, "gone.npz: no readable npz file"),
        (("--latency-ms", "fast"), 2, "Invalid value for '--latency-ms'"),
    ],
)
def test_a_wrong_run_fails_in_one_line(
    artifact: Artifact, args: tuple[object, ...], code: int, message: str
) -> None:
    done = call("run", artifact.path, *args, "-q")
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if code == 3:
        assert done.stderr.startswith("t3c: ")
        assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(artifact: Artifact) -> None:
    assert "Traceback" in call("run", artifact.path, "--profile", "huge", "--debug").stderr


def test_an_infeasible_budget_as_json_names_the_smallest(artifact: Artifact) -> None:
    done = call("run", artifact.path, "--latency-ms", 0.1, "--json")
    found = json.loads(done.stdout)
    assert (found["exit_code"], found["minimum"]) == (3, {"latency_ms": 1.0})


@pytest.mark.parametrize("command", ["run", "inspect", "bench"])
def test_what_is_no_artifact_is_exit_code_5(tmp_path: Path, command: str) -> None:
    done = call(command, tmp_path)
    assert done.exit_code == 5
    assert "no manifest.json" in done.stderr


def test_a_missing_feature_is_exit_code_6(tmp_path: Path) -> None:
    target = TargetInfo("x86", "llvm", None, "future", ("avx9000",))
    done = call("run", toy.write(tmp_path / "a", target=target).path)
    assert done.exit_code == 6
    assert "avx9000" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InfeasibleBudget("m", (), {}), 3),
        (ParityError("m"), 4),
        (ArtifactError("m"), 5),
        (TargetError("m"), 6),
        (ModuleNotFoundError("m"), 6),
        (LoweringError("m"), 1),
        (T3CError("m"), 2),
        (ValueError("m"), 2),
        (IsADirectoryError("m"), 2),
        (OSError("m"), 1),
        (RuntimeError("m"), 1),
    ],
)
def test_every_error_has_its_exit_code(error: Exception, code: int) -> None:
    assert cli.exit_code(error) == code


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, artifact: Artifact) -> list[Any]:
    """Stands in for the compiler; keeps the arguments of every call."""
    calls: list[Any] = []

    def lower(*args: Any, **kwargs: Any) -> Artifact:
        calls.append((args, kwargs))
        kwargs["progress"]("working", 1, 2)
        return artifact

    fake: Any = ModuleType("t3c.api")
    fake.lower = lower
    monkeypatch.setitem(sys.modules, "t3c.api", fake)
    models: Any = ModuleType("some_models")
    models.net = lambda: (torch.nn.Linear(2, 2), torch.zeros(1, 2))
    models.named = lambda: (torch.nn.Linear(2, 2), {"x": torch.zeros(1, 2)})
    models.calibrated = lambda: (*models.net(), [torch.ones(1, 2), (torch.zeros(1, 2),)])
    models.labelled = lambda: (*models.calibrated(), [3, 1])
    models.others = lambda: [torch.ones(1, 2)] * 3
    models.bare = lambda: (torch.nn.Linear(2, 2), None)
    models.single = lambda: torch.nn.Linear(2, 2)
    models.number = 3
    models.broken = lambda: dict[str, int]()["weights"]
    models.counted = lambda: (*models.net(), 5)
    monkeypatch.setitem(sys.modules, "some_models", models)
    return calls


def test_lower_takes_a_callable(api: list[Any], artifact: Artifact, tmp_path: Path) -> None:
    done = call("lower", "some_models:net", "--target", "arm", "--out", tmp_path / "o")
    assert done.exit_code == 0, done.stderr
    ((model, target, args, out), kwargs) = api[0]
    assert isinstance(model, torch.nn.Linear)
    assert (target, len(args), out, kwargs["example_kwargs"]) == ("arm", 1, tmp_path / "o", {})
    assert f"wrote {artifact.path}" in done.stdout.replace("\n", "")
    as_json = call("lower", "some_models:named", "--out", tmp_path / "o", "--json")
    assert json.loads(as_json.stdout)["artifact"] == str(artifact.path)
    assert list(api[1][1]["example_kwargs"]) == ["x"]


def test_lower_takes_calibration_and_a_choice_of_layers(api: list[Any], tmp_path: Path) -> None:
    choice = ("--include", "a.*", "--include", "b.*", "--exclude", "*.head", "--profiles", 3)
    roles = ("--keep", "head", "--keep", "a.*", "--share-roles")
    done = call("lower", "some_models:calibrated", *choice, *roles, "--out", tmp_path / "o")
    assert done.exit_code == 0, done.stderr
    kwargs = api[0][1]
    assert [tuple(x.shape for x in call) for call in kwargs["calibration"]] == [((1, 2),)] * 2
    assert (kwargs["include"], kwargs["exclude"]) == (["a.*", "b.*"], ["*.head"])
    assert kwargs["profiles"] == 3
    assert (kwargs["keep"], kwargs["share_roles"]) == (["head", "a.*"], True)
    call("lower", "some_models:net", "--out", tmp_path / "o")
    kwargs = api[1][1]
    assert kwargs["table"] is None
    assert (kwargs["keep"], kwargs["share_roles"]) == ((), False)
    assert (kwargs["calibration"], kwargs["include"], kwargs["exclude"]) == (None, ("*",), ())


def test_lower_takes_a_file_for_the_damage_table(api: list[Any], tmp_path: Path) -> None:
    table = tmp_path / "damage.jsonl"
    done = call("lower", "some_models:net", "--table", table, "--out", tmp_path / "o")
    assert done.exit_code == 0, done.stderr
    assert api[0][1]["table"] == table


def test_lower_takes_an_objective_or_several(api: list[Any], tmp_path: Path) -> None:
    ask = ("lower", "some_models:net", "--out", tmp_path / "o", "--objective")
    assert call(*ask, "bytes+latency").exit_code == 0
    assert str(api[0][1]["objective"]) == "latency+bytes"
    wrong = call(*ask, "latency+speed")
    assert wrong.exit_code == 2
    assert "allowed are 'latency', 'macs', 'bytes', 'energy'" in wrong.stderr
    assert len(api) == 1


def test_an_unknown_target_is_told_before_the_model_is_made(tmp_path: Path) -> None:
    done = call("lower", "no_such_module:net", "-t", "sparc", "--out", tmp_path / "o")
    assert done.exit_code == 6
    assert "unknown target 'sparc'; known are arm" in done.stderr


def test_lower_takes_shapes_files_and_exported_programs(api: list[Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input=np.zeros((3, 2), np.float32))
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(5, 2),))
    torch.export.save(program, tmp_path / "net.pt2")
    out = ("--out", tmp_path / "o")
    assert call("lower", "some_models:bare", "--shape", "4,2", *out).exit_code == 0
    assert call("lower", "some_models:bare", "--inputs", tmp_path / "x.npz", *out).exit_code == 0
    assert call("lower", tmp_path / "net.pt2", *out).exit_code == 0
    by_shape, by_file, by_program = api
    assert by_shape[0][2][0].shape == (4, 2)
    assert by_file[1]["example_kwargs"]["input"].shape == (3, 2)
    assert by_program[0][2][0].shape == (5, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("net",), "neither module:callable nor a .pt2 file"),
        (("gone.pt2",), "gone.pt2: no such file"),
        (("no_such_module:net",), "no module 'no_such_module' here"),
        (("some_models:gone",), "has no callable 'gone'"),
        (("some_models:number",), "has no callable 'number'"),
        (("some_models:single",), "must return (model, example inputs), got Linear"),
        (("some_models:bare",), "add --inputs or --shape"),
        (("some_models:bare", "--shape", "1,x"), "write positive numbers"),
        (("some_models:broken",), "'some_models:broken' failed: KeyError: 'weights'"),
        (("some_models:counted",), "'some_models:counted': calls must be a list, got int"),
        (("some_models:net", "--inputs", __file__), "no readable npz file: File is not a zip"),
        ((__file__ + ".pt2",), "no such file"),
    ],
)
@pytest.mark.usefixtures("api")
def test_a_wrong_model_is_exit_code_2(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = call("lower", *args, "--out", tmp_path / "o")
    assert done.exit_code == 2
    assert message in done.stderr


def test_what_is_no_exported_program_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"nothing")
    done = call("lower", tmp_path / "net.pt2", "--out", tmp_path / "o")
    assert done.exit_code == 2
    assert "net.pt2: no readable exported program" in done.stderr


def test_outputs_are_written_where_they_shall_be(artifact: Artifact, tmp_path: Path) -> None:
    for name in ("y", "\u00e9.npz"):
        done = call("run", artifact.path, "--profile", "tiny", "--outputs", tmp_path / name)
        assert done.exit_code == 0, done.stderr
        with np.load(tmp_path / name) as stored:
            assert list(stored) == [spec.name for spec in artifact.manifest.outputs]
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "gone" / "y.npz"):
        done = call("run", artifact.path, "--profile", "tiny", "--outputs", path)
        assert done.exit_code == 2
        assert "folder: Is a directory" in done.stderr or "No such file or" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".npz") == ["\u00e9.npz"]


def test_doctor_lists_checks_and_says_whether_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(call("doctor", "--json").stdout)
    names = {check["name"] for check in found["checks"]}
    assert {"python", "torch", "apache-tvm", "machine", "nvcc", "target arm"} <= names
    assert found["healthy"] == all(check["state"] != "missing" for check in found["checks"])

    monkeypatch.setattr("shutil.which", lambda _name: None)  # pyright: ignore
    broken = call("doctor")
    assert broken.exit_code == 6
    assert "see what is missing" in broken.stdout


def test_python_m_t3c_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(cli, "app", lambda: called.append(1))
    runpy.run_module("t3c", run_name="__main__")
    assert called == [1]


def test_inspect_shows_certificates(artifact: Artifact) -> None:
    assert "90% bound" in call("inspect", artifact.path, "--certificates").stdout


def test_plan_says_which_profile_a_budget_picks(artifact: Artifact) -> None:
    done = json.loads(call("plan", artifact.path, "--latency-ms", "1.5", "--json").stdout)
    assert (done["profile"], done["latency_ms"]) == ("tiny", 1.0)
    assert done["energy_mj"] is None
    drift = ("plan", artifact.path, "--max-drift", ".3", "--level", ".9")
    found = json.loads(call(*drift, "--json").stdout)
    assert (found["profile"], found["drift_bound"]) == ("max", 0.1)
    assert "max_drift=0.3 (calibrated at 0.9)" in call(*drift).stdout
    refused = call(*drift, "--latency-ms", "1.5", "--json")
    assert refused.exit_code == 3
    assert json.loads(refused.stdout)["failing"] == ["max_drift"]
    assert call("plan", artifact.path, "--max-drift", "nan").exit_code == 2
    assert call("plan", artifact.path).exit_code == 2


def test_predictions_show_their_interval_and_are_told_of(tmp_path: Path) -> None:
    first, last = toy.manifest().profiles
    timing = Timing(2e-3, 2e-3, Label.PREDICTED, None, 1, 1.5e-3, 3e-3)
    profiles = (first, replace(last, profile=replace(last.profile, latency=timing)))
    net = toy.write(tmp_path / "net", profiles=profiles).path
    assert "1.5-3" in call("inspect", net).stdout
    done = call("plan", net, "--latency-ms", "3.5", "--explain", "--json")
    found = json.loads(done.stdout)
    assert (found["profile"], found["latency_ms"]) == ("max", 3.0)
    assert found["latency"]["label"] == "predicted"
    assert (found["latency"]["low_s"], found["latency"]["high_s"]) == (1.5e-3, 3e-3)
    assert len(found["explanation"]["doubts"]) == 1
    for command in ("plan", "run"):
        done = call(command, net, "--latency-ms", "3.5")
        assert done.exit_code == 0
        assert "budget compares 3 ms, the upper end of its 90 % interval" in done.stderr
    assert call("plan", net, "--latency-ms", "3.5", "--quiet").stderr == ""


def test_certify_runs_on_the_data_that_the_model_brings(
    api: list[Any], artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    given: list[Any] = []

    def certify(*args: Any, **kwargs: Any) -> Artifact:
        seen.append(args)
        given.append(kwargs)
        return artifact

    monkeypatch.setattr(sys.modules["t3c.api"], "certify", certify, raising=False)
    done = call("certify", artifact.path, "some_models:calibrated")
    assert done.exit_code == 0, done.stderr
    assert len(seen[0][2]) == 2
    assert "90% bound" in done.stdout
    assert [given[0][k] for k in ("labels", "shifted", "teaching")] == [None, None, None]
    assert "levels" not in given[0]
    options = ["--shifted", "some_models:others", "--level", ".9", "--level", ".8"]
    options += ["--teaching", "some_models:others"]
    assert call("certify", artifact.path, "some_models:labelled", *options).exit_code == 0
    assert given[1]["labels"] == [3, 1]
    assert [len(c) for c in given[1]["shifted"]] == [1, 1, 1]
    assert [len(c) for c in given[1]["teaching"]] == [1, 1, 1]
    assert given[1]["levels"] == (0.8, 0.9)
    wrong = call("certify", artifact.path, "some_models:labelled", "--shifted", "some_models:net")
    assert wrong.exit_code == 2
    assert "must return a list of calls, got tuple" in wrong.stderr
    wrong = call("certify", artifact.path, "some_models:labelled", "--shifted", "calls")
    assert "'calls' is not module:callable" in wrong.stderr
    without = call("certify", artifact.path, "some_models:net")
    assert without.exit_code != 0
    assert "returns no data" in without.stderr


def test_policy_fits_on_the_data_that_the_model_brings(
    api: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = keep(toy.write(tmp_path / "net"), policy(), {})
    given: list[Any] = []

    def fit_policy(*args: Any, **kwargs: Any) -> Artifact:
        given.append((args, kwargs))
        return kept

    monkeypatch.setattr(sys.modules["t3c.api"], "fit_policy", fit_policy, raising=False)
    done = call("policy", kept.path, "some_models:calibrated", "--looks", "--time-price", "1.5")
    assert done.exit_code == 0, done.stderr
    assert "from budgets and inputs (1 of 2 profiles; a look takes 200 us)" in done.stdout
    (args, kwargs) = given[0]
    assert (args[0], len(args[2])) == (kept.path, 2)
    assert (kwargs["looks"], kwargs["time_price"]) == (True, 1.5)
    without = call("policy", kept.path, "some_models:net")
    assert without.exit_code == 2
    assert "returns no data" in without.stderr
    assert "latency_ms, size_mb" in call("inspect", kept.path).stdout


def test_run_asks_the_policy_only_where_it_is_told_to(artifact: Artifact, tmp_path: Path) -> None:
    kept = keep(toy.write(tmp_path / "net"), policy(steep=0.0), {})  # all are content with half
    budget = ("run", kept.path, "--latency-ms", "9", "--quiet", "--json")
    assert json.loads(call(*budget).stdout)["profile"] == "max"
    assert json.loads(call(*budget, "--policy").stdout)["profile"] == "tiny"
    missing = call("run", artifact.path, "--latency-ms", "9", "--policy")
    assert missing.exit_code == 5
    assert "fit one with `t3c policy`" in missing.stderr
    assert call("run", kept.path, "--policy").exit_code == 2
    assert call("run", kept.path, "--policy", "--latency-ms", "9", "--govern", "1").exit_code == 2


def test_fit_writes_a_model_its_scores_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra: plot)")
    rows = dataset(tmp_path / "rows.jsonl", 60, 4)
    model = tmp_path / "model.json"
    picture = tmp_path / "rows.svg"
    found = call("fit", rows.path, "-o", model, "--plot", picture, "--json")
    assert found.exit_code == 0, found.output
    assert picture.stat().st_size > 10_000
    scores = json.loads(found.stdout)["scores"]
    assert set(scores["kernels"]) == {"learned", "roofline", "roofline, fitted", "table"}
    assert {"mape", "spearman", "coverage"} <= set(scores["networks"]["learned"])
    assert LearnedModel.load(model).device == DEVICE


def test_few_rows_adapt_the_model_of_another_device(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    LearnedModel.learn(dataset(tmp_path / "old.jsonl", 60, 4), VNNI).save(old)
    few = Dataset.open(tmp_path / "few.jsonl", replace(DEVICE, cpu="Other"), print, DEVICE)
    metered = KernelEnergy(kernels(1)[0].row, Joules(1e-3, "rapl"))
    few.append([*kernels(6), metered], few.device)
    found = call("fit", few.path, "-o", new, "--transfer-from", old, "--json")
    assert found.exit_code == 0, found.output
    assert "other device, one factor" in json.loads(found.stdout)["scores"]["kernels"]
    assert "1 kernels and 0 networks are metered" in found.stderr
    model = LearnedModel.load(new)
    assert model.metered is None
    assert model.device == few.device
    assert model.base is not None
    assert model.base.device == DEVICE
    wrong = call("measure", "-o", tmp_path / "none", "--target", "arm", "--transfer-from", old)
    assert wrong.exit_code == 5
    assert "--any-family" in wrong.stderr
    assert not (tmp_path / "none").exists()
    alone = call("fit", few.path, "-o", new)
    assert alone.exit_code == 5
    assert "--transfer-from" in alone.stderr


def test_rows_that_are_corrupted_or_missing_are_exit_code_5(tmp_path: Path) -> None:
    rows = dataset(tmp_path / "rows.jsonl", 6, 2).path
    assert call("fit", tmp_path / "none.jsonl").exit_code == 5
    lines = rows.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace("linear", "conv", 1)
    rows.write_text("".join(lines))
    found = call("fit", rows, "-o", tmp_path / "model.json")
    assert found.exit_code == 5
    assert "line 3: corrupted" in found.stderr
    assert not (tmp_path / "model.json").exists()


def test_measure_refuses_a_device_that_is_none_and_rows_of_another(tmp_path: Path) -> None:
    wrong = call("measure", "--device", "nowhere", "-o", tmp_path / "new.jsonl")
    assert wrong.exit_code == 2
    assert "host:port" in wrong.stderr
    rows = dataset(tmp_path / "rows.jsonl", 6, 2).path
    other = call("measure", "-o", rows)
    assert other.exit_code == 5
    assert "holds rows of another device" in other.stderr
