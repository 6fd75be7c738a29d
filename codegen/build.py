"""From an exported program and a chain of profiles to one shared library and its weights."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from t3c.codegen import cuda
from t3c.codegen.expand import ProfileBuilder
from t3c.codegen.families import families_of
from t3c.codegen.finish import finish
from t3c.codegen.generic import GenericBuilder
from t3c.codegen.import_graph import import_program
from t3c.codegen.kernels.schedule import Schedule
from t3c.codegen.rules import schedule_module
from t3c.codegen.tvm_api import relax, tvm
from t3c.codegen.weights import WeightStore
from t3c.core.codes import SiteCodes
from t3c.core.errors import LoweringError
from t3c.core.formats import Format
from t3c.core.sites import Site
from t3c.targets.base import TargetSpec

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BuiltProfile:
    """One function of the library.

    Attributes:
        function: Its name in the library; ``probe_...`` is the same with taps.
        weights: Names of the tensors that it takes, in order.
        storage_bytes: Bytes of a weight file that served this profile alone, counted.
        activation_bytes: Bytes of the planned activation memory of one call.
    """

    function: str
    weights: tuple[str, ...]
    storage_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled library, not yet on disk as an artifact.

    Attributes:
        profiles: Profile name -> its function.
        tensors: Tensor name -> array: the weight file.
        executable: TVM's executable; `save` links it.
        spec: The target.
        taps: Site of each input that a probe function returns behind its outputs.
    """

    profiles: Mapping[str, BuiltProfile]
    tensors: Mapping[str, NDArray[np.generic]]
    executable: Any
    spec: TargetSpec
    taps: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Link the shared library."""
        options: dict[str, Any] = {"options": ["-s"]}  # strip: a third of the file is symbols
        if self.spec.cross_compiler and not is_host(self.spec):
            options["fcompile"] = tvm.support.cc.cross_compiler(self.spec.cross_compiler)
        self.executable.export_library(str(path), **options)


def build(
    program: torch.export.ExportedProgram,
    sites: Mapping[str, Site],
    codes: Mapping[str, SiteCodes],
    profiles: Mapping[str, Mapping[str, Format]],
    spec: TargetSpec,
    progress: Progress | None = None,
    tuned: Mapping[str, Schedule] | None = None,
) -> Built:
    """Compile every profile of a chain into one library.

    Args:
        program: Exported lowering graph (placeholder ops for the sites).
        sites: Site name -> site.
        codes: Site name -> integer weights at the largest ranks in use.
        profiles: Profile name -> (site name -> format), from the smallest to the largest.
        spec: The target.
        progress: Called with (what, done, total).
        tuned: Key of an operator -> schedule (`families_of`).

    Raises:
        LoweringError: An operator, a format or a kernel does not fit the target.
    """
    say = progress or (lambda what, done, total: None)
    steps = len(profiles) + 3
    say("import graph", 0, steps)
    target = tvm_target(spec)
    skeleton = import_program(program, spec)
    say("schedule float operators", 1, steps)
    store = WeightStore(sites, codes, families_of(spec, tuned))
    generic = spec.linear == "generic"  # sites are float operators too: schedule them afterwards
    if not generic:
        skeleton.module = _lower_floats(skeleton.module, spec, target)
    writer = GenericBuilder(skeleton, store) if generic else ProfileBuilder(skeleton, store)
    weights: dict[str, tuple[str, ...]] = {}
    for i, (name, formats) in enumerate(profiles.items()):
        say(f"profile {name}", 2 + i, steps)
        weights[name] = writer.add(f"profile_{name}", formats)
        writer.add(f"probe_{name}", formats, probe=True)
    say("generate machine code", 2 + len(profiles), steps)
    planned: dict[str, int] = {}
    try:
        # LLVM finds common subexpressions itself; TVM's pass took 70 % of the compile time.
        with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
            module = writer.module()
            if generic:
                module = _lower_floats(module, spec, target)
            if spec.kind == "cuda":
                executable: Any = cuda.compile_module(
                    module, target, planned, None if is_host(spec) else spec.cross_compiler
                )
            else:
                executable = relax.build(
                    module, target=target, relax_pipeline=finish(planned, target)
                )
    except (RuntimeError, ValueError) as error:
        raise LoweringError(f"TVM cannot build the library for {spec.name!r}: {error}") from error
    say("done", steps, steps)
    built = {
        name: BuiltProfile(
            function=f"profile_{name}",
            weights=weights[name],
            storage_bytes=_storage(store, weights[name], formats),
            activation_bytes=planned[f"profile_{name}"],
        )
        for name, formats in profiles.items()
    }
    taps = tuple(call.site for call in skeleton.site_calls())
    return Built(built, store.tensors, executable, spec, taps)


def tvm_target(spec: TargetSpec) -> Any:
    """TVM's description of the target."""
    host: dict[str, Any] = {"kind": "llvm", "mcpu": spec.mcpu}
    if spec.triple:
        host["mtriple"] = spec.triple
    if spec.mattr:
        host["mattr"] = list(spec.mattr)
    if spec.kind == "llvm":
        return tvm.target.Target(host)
    device = {"kind": spec.kind, "arch": spec.arch, **spec.options}
    return tvm.target.Target(device, host=tvm.target.Target(host))


def is_host(spec: TargetSpec) -> bool:
    """Whether this machine can run what is built for `spec`."""
    return spec.triple is None or spec.triple.split("-")[0] == platform.machine()


def _lower_floats(module: Any, spec: TargetSpec, target: Any) -> Any:
    """Legalize, fuse and schedule everything that is not an opaque call."""
    with target:
        fused = tvm.transform.Sequential(
            [
                relax.transform.DecomposeOpsForInference(),
                relax.transform.CanonicalizeBindings(),
                relax.transform.EliminateCommonSubexpr(),
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FoldConstant(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.RewriteDataflowReshape(),
                relax.transform.DeadCodeElimination(),
            ]
        )(module)
        return cuda.schedule(fused, target) if spec.kind == "cuda" else schedule_module(fused, spec)


def _storage(store: WeightStore, names: Sequence[str], formats: Mapping[str, Format]) -> int:
    """Bytes of the tensors that one profile reads, factors cut to its ranks."""
    plain = sum(store.tensors[n].nbytes for n in names if ":" not in n)
    return plain + sum(store.bytes(site, fmt) for site, fmt in formats.items())
