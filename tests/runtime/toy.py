"""A small artifact made by hand, so that the runtime is tested without the compiler pipeline."""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from t3c.codegen import machine_code
from t3c.codegen.calls import Program, flatten, lay_out
from t3c.codegen.entries import entry
from t3c.core.artifact import Artifact
from t3c.core.certificate import (
    PAPER,
    Bound,
    Calibrated,
    Certificate,
    Estimate,
    Observed,
    Proxy,
    Share,
)
from t3c.core.formats import Dense, LowRank
from t3c.core.manifest import (
    CompiledProfile,
    Manifest,
    Parity,
    Stages,
    TargetInfo,
    TensorSpec,
)
from t3c.core.profile import Energy, Label, Profile, Timing
from t3c.core.report import ConversionReport, Row
from t3c.core.structure import LEAF
from t3c.runtime import bundle

ROWS, K, N, RANK = 4, 16, 32, 8
NAMES = ("tiny", "max")
WEIGHTS = {"tiny": ("fc.low", "fc.high", "shift", "scale"), "max": ("fc.dense", "shift", "scale")}


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """Weights of both profiles; `shift` and `scale` have 4 bytes: one of them is not aligned."""
    rng = np.random.default_rng(0)
    return {
        "shift": np.array([0.5], np.float32),
        "scale": np.array([2.0], np.float32),
        "fc.low": rng.standard_normal((RANK, K)).astype(np.float32),
        "fc.high": rng.standard_normal((N, RANK)).astype(np.float32),
        "fc.dense": rng.standard_normal((N, K)).astype(np.float32),
    }


def inputs(seed: int = 0) -> np.ndarray[Any, Any]:
    """One input batch."""
    return np.random.default_rng(seed).standard_normal((ROWS, K)).astype(np.float32)


def expected(name: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What profile `name` computes."""
    w = tensors()
    y: np.ndarray[Any, Any]
    y = x @ w["fc.dense"].T if name == "max" else (x @ w["fc.low"].T) @ w["fc.high"].T
    return np.asarray(y + w["shift"])


def emit_profile(builder: Any, name: str) -> None:
    """Add the function of one profile."""
    arrays = tensors()
    tensor: Any = relax.TensorType
    x = relax.Var("x", tensor((ROWS, K), "float32"))
    fields = [tensor(arrays[w].shape, "float32") for w in WEIGHTS[name]]
    weights = relax.Var("weights", relax.TupleType(fields))
    with builder.function(f"profile_{name}", [x, weights]):
        with builder.dataflow():
            y: Any = x
            last = len(fields) - 1
            for i in range(last - 1):
                w = builder.emit(relax.op.permute_dims(relax.TupleGetItem(weights, i)))
                y = builder.emit(relax.op.matmul(y, w))
            shifted = builder.emit(relax.op.add(y, relax.TupleGetItem(weights, last - 1)))
            double = builder.emit(relax.op.multiply(shifted, relax.TupleGetItem(weights, last)))
            out = builder.emit_output(relax.Tuple([shifted, double]))
        builder.emit_func_output(out)


@cache
def library() -> bytes:
    """The shared library with both functions, compiled once per process."""
    builder = relax.BlockBuilder()
    for name in NAMES:
        emit_profile(builder, name)
    built = relax.build(builder.get(), target=tvm.target.Target({"kind": "llvm"}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.so"
        built.export_library(str(path))
        return path.read_bytes()


def calibrated(bound: float) -> Calibrated:
    """A bound, invented."""
    return Calibrated((Bound(0.9, bound, bound, 0.05, (0.9, 1.0, 0.8)),), 30, "ab" * 32)


def proxy(value: float) -> Proxy:
    """A proxy, invented."""
    estimate = Estimate(value, value, value, 0.0)
    share = Share(1.0, value, 1.0, 0.0, {PAPER: value})
    return Proxy({PAPER: estimate}, {"fc": share}, 0.0, 8, 1, 0.1)


def profile(name: str) -> Profile:
    """Costs of one profile, invented."""
    large = name == "max"
    return Profile(
        name=name,
        formats={"fc": Dense(8) if large else LowRank(RANK, 8)},
        macs=ROWS * (N * K if large else RANK * (N + K)),
        storage_bytes=2052 if large else 1540,
        ram_bytes=4000 if large else 3000,
        latency=Timing(1e-3, 2e-3, Label.MEASURED, 20)
        if large
        else Timing(5e-4, 1e-3, Label.MEASURED, 20),
        energy=Energy(2e-3, Label.ESTIMATED) if large else None,
        certificate=Certificate(
            proxy=proxy(0.25 if large else 1.5),
            calibrated=calibrated(0.1 if large else float("inf")),
            observed=Observed(0.1, 0.1, 0.2, 0.3, 0.01, None, 8),
        ),
    )


def manifest(**changes: Any) -> Manifest:
    """A manifest of the toy; `changes` replace fields."""
    parity = Parity(1e-7, 1e-6, 1e-3, 4, "device")
    base = Manifest(
        target=TargetInfo("x86", "llvm", None, "generic"),
        stages=Stages(built=True),
        library="lib/x86.so",
        inputs=(TensorSpec("x", (ROWS, K), "float32"),),
        outputs=(
            TensorSpec("logits", (ROWS, N), "float32"),
            TensorSpec("double", (ROWS, N), "float32"),
        ),
        input_tree={
            "kind": "tuple",
            "items": [{"kind": "tuple", "items": [LEAF]}, {"kind": "dict", "items": {}}],
        },
        output_tree={"kind": "dict", "items": {"logits": LEAF, "double": LEAF}},
        profiles=tuple(
            CompiledProfile(profile(n), f"profile_{n}", WEIGHTS[n], parity) for n in NAMES
        ),
        versions={"t3c": "0.1.0", "torch": "2.13.0", "tvm": "0.27.0"},
        report=ConversionReport(
            (Row("fc", "linear", "rewritten", "rank up to 16", "rewrite-linear"),)
        ),
        assumptions=("bits: 8",),
        calibration_sha256="00ff",
    )
    return replace(base, **changes)


def write(folder: Path, **changes: Any) -> Artifact:
    """An artifact in `folder` (which must not exist or be empty)."""
    return bundle.write(folder, manifest(**changes), library(), tensors())


def programs() -> tuple[dict[str, Program], dict[str, Any]]:
    """The functions as straight-line code, and their kernels."""
    builder = relax.BlockBuilder()
    for name in NAMES:
        emit_profile(builder, name)
    module = relax.transform.LegalizeOps()(builder.get())
    passes = [relax.transform.ToNonDataflow(), relax.transform.CallTIRRewrite()]
    module = tvm.transform.Sequential(passes)(module)
    made = {n: flatten(module[f"profile_{n}"], WEIGHTS[n], lambda name, _: name) for n in NAMES}
    return made, {c.kernel: module[c.kernel] for p in made.values() for c in p.calls}


@cache
def native_library() -> bytes:
    """The same functions without a virtual machine, and their traces."""
    target = tvm.target.Target({"kind": "llvm"})
    made, kernels = programs()
    texts = [entry(f"profile_{n}", p, lay_out(p)) for n, p in made.items()]
    texts += [entry(f"trace_{n}", p, lay_out(p), trace=True) for n, p in made.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.so"
        objects = [machine_code.kernels(kernels, target), machine_code.entries(texts, target)]
        machine_code.link(objects, path, None)
        return path.read_bytes()


def write_native(folder: Path, **changes: Any) -> Artifact:
    """The toy with a library of machine code alone."""
    made, _ = programs()
    profiles = tuple(
        CompiledProfile(
            profile(n),
            f"profile_{n}",
            p.weights,
            Parity(1e-7, 1e-6, 1e-3, 4, "device"),
            lay_out(p).arena_bytes,
        )
        for n, p in made.items()
    )
    whole = manifest(profiles=profiles, **changes)
    return bundle.write(folder, whole, native_library(), tensors())
