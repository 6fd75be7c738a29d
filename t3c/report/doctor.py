"""What works on this machine, what does not, and what to do about it."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from t3c.core.errors import T3CError
from t3c.cost_models import meters
from t3c.runtime import emulate, host
from t3c.targets import TARGETS, TargetSpec, cpu_features, detect_host, get

State = Literal["ok", "warning", "missing"]
CHECKED = ("torch", "apache-tvm", "apache-tvm-ffi", "numpy", "xgboost-cpu", "onnx", "matplotlib")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes:
        name: What.
        state: ``missing`` only where lowering and running for this machine needs it.
        found: What is there.
        advice: What to do; empty if nothing.
    """

    name: str
    state: State
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return asdict(self)


def examine() -> list[Check]:
    """Every check, in order."""
    groups: tuple[Callable[[], Iterable[Check]], ...] = (
        _python,
        _packages,
        _processor,
        _threads,
        _linkers,
        _targets,
        _cuda,
        _energy,
    )
    return [check for group in groups for check in group()]


def healthy(checks: Iterable[Check]) -> bool:
    """Whether models can be lowered for this machine and run on it."""
    return all(check.state != "missing" for check in checks)


def table(checks: Iterable[Check]) -> Table:
    """The checks for a terminal."""
    rows = Table(show_edge=False, pad_edge=False)
    for heading in ("check", "state", "found", "what to do"):
        rows.add_column(heading, overflow="fold")
    colour = {"ok": "green", "warning": "yellow", "missing": "red"}
    for c in checks:
        rows.add_row(c.name, f"[{colour[c.state]}]{c.state}[/]", c.found, c.advice)
    return rows


def pins(requirements: Iterable[str]) -> dict[str, str]:
    """Package -> exact pin (``1.2.3`` or ``1.2.*``) among requirement lines."""
    found: dict[str, str] = {}
    for line in requirements:
        name, exact, pin = line.partition(";")[0].partition("==")
        if exact:
            found[name.strip()] = pin.strip()
    return found


def fits(installed: str, pin: str) -> bool:
    """Whether a version keeps a pin."""
    if pin.endswith(".*"):
        return installed.startswith(pin[:-1])
    return installed.partition("+")[0] == pin


def _python() -> Iterable[Check]:
    fine = sys.version_info >= (3, 11)
    yield Check(
        "python",
        "ok" if fine else "missing",
        platform.python_version(),
        "" if fine else "use 3.11+",
    )


def _packages() -> Iterable[Check]:
    try:
        wanted = pins(requires("t3c") or ())
    except PackageNotFoundError:
        wanted = {}
        yield Check("t3c", "warning", "not installed: pins are not checked", "pip install -e .")
    for name in CHECKED:
        pin = wanted.get(name, "")
        optional = name in ("matplotlib", "xgboost-cpu")
        try:
            have = version(name)
        except PackageNotFoundError:
            state: State = "warning" if optional else "missing"
            yield Check(name, state, "not installed", f"pip install {name}{'==' * bool(pin)}{pin}")
            continue
        if pin and not fits(have, pin):
            advice = f"T3C is tested with {pin}: pip install {name}=={pin}"
            yield Check(name, "warning", have, advice)
        else:
            yield Check(name, "ok", have)


def _processor() -> Iterable[Check]:
    cores = os.cpu_count() or 1
    yield Check("machine", "ok", f"{host.machine()}, {cores} processors")
    try:
        spec = detect_host()
    except T3CError as error:
        yield Check("cpu level", "missing", "none", str(error))
        return
    known = sorted(spec.features)
    shown = ", ".join(known[:12]) + (" ..." if len(known) > 12 else "")
    yield Check("cpu level", "ok", f"{spec.name}: {shown}")
    if "amx_tile" in cpu_features():
        try:
            host.allow_tiles()
            yield Check("amx tiles", "ok", "Linux grants them")
        except T3CError as error:
            yield Check("amx tiles", "warning", "refused", str(error))


def _threads() -> Iterable[Check]:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name)
        if value is not None and value.isdigit() and int(value) > usable:
            advice = f"set it to {usable} or less"
            yield Check(name, "warning", f"{value} threads, {usable} processors usable", advice)
        else:
            yield Check(name, "ok", f"{value or 'not set'}, {usable} processors usable")


def _linkers() -> Iterable[Check]:
    found = next(filter(None, map(shutil.which, _host_compilers())), None)
    if found is None:
        yield Check("C++ compiler", "missing", "none", "install g++ or clang++ to link libraries")
    else:
        yield Check("C++ compiler", "ok", found)


def _host_compilers() -> tuple[str, ...]:
    return (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")


def _targets() -> Iterable[Check]:
    for name in TARGETS:
        try:
            spec = get(name)
        except T3CError as error:
            yield Check(f"target {name}", "warning", "not on this machine", str(error))
            continue
        yield _target(name, spec)


def _target(name: str, spec: TargetSpec) -> Check:
    label = f"target {name}"
    if unknown := _without_kernels(spec):
        return Check(label, "warning", "no kernels", f"this version has no {unknown}")
    compiler = spec.cross_compiler
    if spec.kind == "cuda":
        built = shutil.which("nvcc") is not None
        runs = built and Path("/dev/nvidia0").exists()
        advice = (
            "" if built else "install the CUDA toolkit to build; without it only plans are made"
        )
        state: State = "ok" if built else "warning"
        return Check(label, state, "builds and runs" if runs else _can(built), advice)
    triple = spec.triple or host.machine()
    if triple.partition("-")[0] == host.machine():
        lacks = sorted(spec.features - cpu_features())
        if not lacks:
            return Check(label, "ok", "builds and runs")
        return Check(label, "ok", "builds only", f"this processor lacks {', '.join(lacks)}")
    if compiler is None or shutil.which(compiler) is None:
        return Check(label, "warning", "does not link", f"install {compiler or 'a cross compiler'}")
    emulator = None if spec.emulator is None else shutil.which(spec.emulator)
    if emulator is None:
        return Check(label, "ok", "builds only", f"install {spec.emulator} to check it here")
    if missing := emulate.missing_runtime(triple):
        return Check(label, "ok", "builds only", f"to check it here: {missing}")
    return Check(label, "ok", "builds, runs under emulation")


def _without_kernels(spec: TargetSpec) -> str:
    """Which of a target's kernel families are not there; empty if all are."""
    try:
        families: Any = import_module("t3c.codegen.families")
    except ImportError:  # TVM is missing, which the packages say
        return ""
    linear = () if spec.linear in families.LINEAR else (f"linear kernels {spec.linear!r}",)
    conv = () if spec.conv in families.CONV else (f"convolution kernels {spec.conv!r}",)
    return " and no ".join(linear + conv)


def _can(built: bool) -> str:
    return "builds only" if built else "does not build"


def _cuda() -> Iterable[Check]:
    nvcc = shutil.which("nvcc")
    gpu = Path("/dev/nvidia0").exists()
    yield Check(
        "nvcc", "ok" if nvcc else "warning", nvcc or "none", "" if nvcc else "for cuda only"
    )
    yield Check("NVIDIA GPU", "ok" if gpu else "warning", "yes" if gpu else "none", "")


def _energy() -> Iterable[Check]:
    for meter in meters.access():
        state: State = "ok" if meter.works else "warning"
        yield Check(f"energy meter {meter.name}", state, meter.found, meter.advice)
