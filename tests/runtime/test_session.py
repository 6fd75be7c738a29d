"""A session computes what its profile says, moves no weight, and refuses what it must."""

import os
import shutil
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t3c.core.artifact import Artifact
from t3c.core.errors import ArtifactError, InfeasibleBudget, T3CError, TargetError
from t3c.core.manifest import TargetInfo, TensorSpec
from t3c.core.profile import Label, Timing
from t3c.core.structure import LEAF
from t3c.runtime import bundle
from t3c.runtime.session import Session, load
from t3c.runtime.weights import aligned_copy
from tests.runtime import toy


@pytest.fixture(scope="module", params=["native", "machine"])
def artifact(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Artifact:
    """The toy as machine code alone, and for TVM's virtual machine."""
    write = toy.write_native if request.param == "native" else toy.write
    return write(tmp_path_factory.mktemp("toy") / "artifact")


@pytest.fixture
def session(artifact: Artifact) -> Session:
    return load(artifact)


@pytest.fixture
def copy(artifact: Artifact, tmp_path: Path) -> Path:
    """An artifact of its own to damage."""
    shutil.copytree(artifact.path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", toy.NAMES)
def test_every_profile_computes_its_own_function(session: Session, name: str) -> None:
    x = toy.inputs()
    assert session.set_profile(name).name == name
    out = session(x)
    np.testing.assert_allclose(out.logits, toy.expected(name, x), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(out["double"], 2 * out[0])


def test_profiles_ascend_and_the_largest_is_current_at_first(session: Session) -> None:
    assert [p.name for p in session.profiles] == list(toy.NAMES)
    assert session.profile.name == "max"
    assert session.profiles[0].latency_ms == 1.0
    proxy = session.profiles[1].certificate.proxy
    assert proxy is not None
    assert proxy.paper.value == 0.25


def test_a_budget_on_a_prediction_is_kept_by_its_upper_end_and_warns_once(tmp_path: Path) -> None:
    first, last = toy.manifest().profiles
    told = Timing(2e-3, 2e-3, Label.PREDICTED, None, 1, 1.5e-3, 3e-3)
    profiles = (first, replace(last, profile=replace(last.profile, latency=told)))
    session = load(toy.write(tmp_path / "a", profiles=profiles))
    assert session.set_budget(latency_ms=2.9).name == "tiny"  # measured: no warning
    with pytest.warns(UserWarning, match=r"'max' is predicted, .* compares 3 ms, the upper end"):
        assert session.set_budget(latency_ms=3.1).name == "max"
    assert session.set_budget(latency_ms=3.1).name == "max"  # told before
    assert load(session.path).manifest == session.manifest


def test_inputs_go_by_position_by_name_and_as_torch(session: Session) -> None:
    x = toy.inputs()
    want = session(x).logits
    np.testing.assert_array_equal(session(x=x).logits, want)
    out = session(torch.from_numpy(x).requires_grad_())
    assert isinstance(out.logits, torch.Tensor)
    np.testing.assert_array_equal(out.logits.numpy(), want)


def test_a_kwarg_of_the_model_may_be_given_by_position_and_the_reverse(tmp_path: Path) -> None:
    tree = {
        "kind": "tuple",
        "items": [{"kind": "tuple", "items": []}, {"kind": "dict", "items": {"x": LEAF}}],
    }
    session = load(toy.write(tmp_path / "a", input_tree=tree))
    x = toy.inputs()
    np.testing.assert_array_equal(session(x).logits, session(x=x).logits)


def test_switching_moves_no_weight(session: Session) -> None:
    weights = {name: session.variants[name] for name in toy.NAMES}
    assert session.weight_bytes_copied == 4  # only the second tensor of four bytes
    x = aligned_copy(toy.inputs())
    before = session.bytes_copied
    for name in toy.NAMES * 3:
        session.set_profile(name)
        session(x)
    assert session.bytes_copied == before
    assert session.switches == 6
    assert weights == dict(session.variants)
    session.set_profile("max")
    assert session.switches == 6


def test_weights_are_the_pages_of_the_file(session: Session) -> None:
    for name in ("fc.dense", "fc.low"):
        tensor = session._tensors[name]  # pyright: ignore[reportPrivateUsage]
        view = session._weights[name]  # pyright: ignore[reportPrivateUsage]
        assert np.from_dlpack(tensor).ctypes.data == view.ctypes.data


def test_an_input_that_no_kernel_can_read_in_place_is_copied_and_counted(session: Session) -> None:
    x = toy.inputs()
    room = np.zeros(x.size + 32, np.float32)
    start = (-room.ctypes.data % 64) // 4 + 1
    crooked = room[start : start + x.size].reshape(x.shape)
    crooked[...] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    for odd in (crooked, torch.from_numpy(crooked), frozen):
        before = session.bytes_copied
        np.testing.assert_array_equal(np.asarray(session(odd).logits), session(x).logits)
        assert session.bytes_copied >= before + x.nbytes


def test_outputs_of_earlier_calls_stay(session: Session) -> None:
    first = session(toy.inputs(0)).logits
    kept = first.copy()
    session(toy.inputs(1))
    np.testing.assert_array_equal(first, kept)


def test_concurrent_calls_run_on_the_profile_they_started_with(session: Session) -> None:
    x = toy.inputs()
    want = {name: session.variants[name](x).logits for name in toy.NAMES}
    seen: set[str] = set()
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            name = str(rng.choice(toy.NAMES))
            session.set_profile(name)
            out = session(x).logits
            match = [n for n in toy.NAMES if np.array_equal(out, want[n])]
            pinned = session.variants[name](x).logits
            if len(match) != 1 or not np.array_equal(pinned, want[name]):
                wrong.append((seed, match))
            seen.update(match)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen == set(toy.NAMES)


def test_a_latency_of_another_number_of_threads_warns_once(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert load(artifact).threads == 1  # what the toy's latencies say, on any machine
    other = load(artifact, threads=2)
    assert other.set_budget(size_mb=1e3).name == "max"  # no latency, no warning
    with pytest.warns(UserWarning, match="threads=1, this session calls with threads=2"):
        assert other.set_budget(latency_ms=1e3).name == "max"
    assert other.set_budget(latency_ms=1e3).name == "max"  # told before


def test_a_budget_picks_the_largest_profile_within_it(session: Session) -> None:
    assert session.set_budget(latency_ms=1.5).name == "tiny"
    assert session.profile.name == "tiny"
    assert session.set_budget(latency_ms=2.0, size_mb=1.0, ram_mb=1.0).name == "max"


def test_a_limit_of_drift_compares_the_certificate(session: Session) -> None:
    session.set_profile("tiny")  # whose bound is infinite; that of max is 0.1
    assert session.set_budget(max_drift=0.3).name == "max"
    with pytest.raises(InfeasibleBudget, match=r"within latency_ms=1"):
        session.set_budget(latency_ms=1.0, max_drift=0.3, level=0.9)
    assert session.profile.name == "max"
    with pytest.raises(InfeasibleBudget, match="lower with domain="):
        session.set_budget(max_drift=0.3, drift="sound")


def test_an_infeasible_budget_changes_nothing(session: Session) -> None:
    session.set_profile("tiny")
    with pytest.raises(InfeasibleBudget) as caught:
        session.set_budget(latency_ms=0.5)
    assert session.profile.name == "tiny"
    assert session.set_budget(**caught.value.minimum).name == "tiny"  # type: ignore[arg-type]


def test_an_unknown_profile_lists_the_known_ones(session: Session) -> None:
    with pytest.raises(T3CError, match=r"no profile 'huge'; there are tiny, max"):
        session.set_profile("huge")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.zeros((4, 16)), TypeError, "input 'x': expected float32, got float64"),
        (np.zeros((4, 17), np.float32), ValueError, r"expected shape \[4, 16\], got \[4, 17\]"),
        (np.zeros((16, 4), np.float32).T, ValueError, "input 'x': not contiguous"),
        (torch.zeros(16, 4).T, ValueError, "input 'x': not contiguous"),
        ([[0.0]], TypeError, "expected a float32 array, got list"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_a_wrong_input_is_named(
    session: Session, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        session(value)


def test_int32_for_int64_says_how_to_convert(tmp_path: Path) -> None:
    specs = (TensorSpec("ids", (4, 16), "int64"),)
    session = load(toy.write(tmp_path / "a", inputs=specs))
    with pytest.raises(TypeError, match=r"expected int64, got int32; convert .*astype\('int64'\)"):
        session(np.zeros((4, 16), np.int32))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing input 'x'"),
        ((), {"y": 1}, "unknown input 'y'"),
        ((1, 2), {}, "2 positional"),
        ((1,), {"x": 1}, "overlap"),
    ],
)
def test_a_wrong_call_is_named(
    session: Session, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        session(*args, **kwargs)


def test_benchmark_gives_a_measured_timing(session: Session) -> None:
    timing = session.benchmark("tiny", (toy.inputs(),), calls=5, warmup=1)
    assert (timing.calls, timing.label.value, timing.threads) == (5, "measured", 1)
    with pytest.raises(ValueError, match="calls is 0"):
        session.benchmark("tiny", {"x": toy.inputs()}, calls=0, warmup=0)
    with pytest.raises(T3CError, match="no profile 'huge'"):
        session.benchmark("huge", (toy.inputs(),), calls=1, warmup=0)


@pytest.mark.parametrize("name", ["lib/x86.so", "weights.safetensors", "run.py"])
def test_a_damaged_file_is_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name}: damaged"):
        load(copy)


def test_a_missing_and_a_shortened_file_are_refused(copy: Path) -> None:
    weights = copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="the manifest says"):
        load(copy, hashes=False)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"weights\.safetensors: missing"):
        load(copy)


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "manifest.json").read_text()
    assert old in text
    (folder / "manifest.json").write_text(text.replace(old, new))


def test_a_newer_schema_is_refused_and_says_which_version_reads_it(copy: Path) -> None:
    edit(copy, '"schema": 3', '"schema": 4')
    edit(copy, '"t3c": "0.1.0"', '"t3c": "9.1.0"')
    with pytest.raises(ArtifactError, match=r"schema 4 was written by t3c 9\.1\.0.*install t3c 9"):
        load(copy)


@pytest.mark.parametrize("path", ["../x86.so", "/lib/x86.so", "lib/../../x86.so", "c:/x86.so"])
def test_a_path_out_of_the_folder_is_refused(copy: Path, path: str) -> None:
    edit(copy, '"lib/x86.so"', f'"{path}"')
    with pytest.raises(ArtifactError, match="leads outside"):
        load(copy)


def test_a_link_out_of_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    os.replace(copy / "lib" / "x86.so", tmp_path / "x86.so")
    (copy / "lib" / "x86.so").symlink_to(tmp_path / "x86.so")
    with pytest.raises(ArtifactError, match="leads outside"):
        load(copy)


def test_a_library_that_no_hash_covers_is_refused(copy: Path) -> None:
    edit(copy, '"library": "lib/x86.so"', '"library": "lib/other.so"')
    with pytest.raises(ArtifactError, match=r"does not list .lib/other\.so."):
        load(copy)


def test_missing_cpu_features_are_listed(tmp_path: Path) -> None:
    target = TargetInfo("x86", "llvm", None, "future", ("sse2x", "avx9000", "fpu"))
    with pytest.raises(TargetError, match=r"lacks: avx9000, sse2x;"):
        load(toy.write(tmp_path / "a", target=target))


def test_another_architecture_names_both(copy: Path) -> None:
    artifact = Artifact.read(copy)
    data = bytearray(artifact.library.read_bytes())
    data[18] = 8  # ELF machine: MIPS
    artifact.library.write_bytes(data)
    changed = bundle.write(copy, artifact.manifest, bytes(data), toy.tensors())
    with pytest.raises(TargetError, match=r"built for ELF machine 8.*this machine is \w+"):
        load(changed)


def test_what_is_no_library_is_refused(copy: Path) -> None:
    changed = bundle.write(copy, toy.manifest(), b"text", toy.tensors())
    with pytest.raises(ArtifactError, match="is no ELF shared library"):
        load(changed)


def test_a_function_that_is_not_there_is_refused(copy: Path) -> None:
    edit(copy, '"function": "profile_tiny"', '"function": "profile_gone"')
    with pytest.raises(ArtifactError, match="no function 'profile_gone'"):
        load(copy)


def test_a_tensor_that_is_not_there_is_refused(copy: Path) -> None:
    edit(copy, '"fc.low"', '"fc.gone"')
    with pytest.raises(ArtifactError, match=r"has no tensor 'fc\.gone'"):
        load(copy)


def test_switch_time_is_reported(session: Session, record_property: Any) -> None:
    times: list[float] = []
    for name in toy.NAMES * 500:
        start = time.perf_counter()
        session.set_profile(name)
        times.append(time.perf_counter() - start)
    record_property("median_switch_us", statistics.median(times) * 1e6)
