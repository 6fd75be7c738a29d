"""From an exported program and a chain of profiles to one shared library and its weights."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from t3c.codegen import cuda, machine_code
from t3c.codegen.calls import Layout, Program, flatten, lay_out
from t3c.codegen.entries import entry
from t3c.codegen.expand import KernelOf, ProfileBuilder
from t3c.codegen.families import families_of
from t3c.codegen.generic import GenericBuilder
from t3c.codegen.import_graph import import_program
from t3c.codegen.kernels.schedule import Schedule
from t3c.codegen.rules import schedule_module
from t3c.codegen.tvm_api import relax, tvm
from t3c.codegen.weights import WeightStore
from t3c.core.codes import Correction, SiteCodes
from t3c.core.errors import LoweringError
from t3c.core.formats import Format
from t3c.core.probe import Probe, Tap, Trace
from t3c.core.sites import Site
from t3c.targets.base import TargetSpec

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BuiltProfile:
    """One function of the library.

    Attributes:
        function: Its name in the library.
        weights: Names of the tensors that it takes, in order.
        storage_bytes: Bytes of a weight file that served this profile alone, counted.
        activation_bytes: Bytes of the planned activation memory of one call.
        arena_bytes: Bytes of the arena that it takes; None: a function of TVM's virtual machine,
            which allocates.
        reads: Tensor name -> bytes that it reads at the front, where it does not read the rest.
    """

    function: str
    weights: tuple[str, ...]
    storage_bytes: int
    activation_bytes: int
    arena_bytes: int | None = None
    reads: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled library, not yet on disk as an artifact.

    Attributes:
        profiles: Profile name -> its function.
        tensors: Tensor name -> array: the weight file.
        spec: The target.
        code: Object code of kernels and profiles, or a library that is linked already.
        checks: Object code of probes and traces.
        probes: Profile name -> its probe.
        traces: Profile name -> its trace.
    """

    profiles: Mapping[str, BuiltProfile]
    tensors: Mapping[str, NDArray[np.generic]]
    spec: TargetSpec
    code: Any
    checks: tuple[Any, ...] = ()
    probes: Mapping[str, Probe] = field(default_factory=dict)
    traces: Mapping[str, Trace] = field(default_factory=dict)

    def save(self, path: Path, *, checks: bool = False) -> None:
        """Link the shared library.

        Args:
            path: The file.
            checks: With probes and traces; the kernels are the same machine code.
        """
        if isinstance(self.code, cuda.Linked):
            path.write_bytes(self.code.content)
            return
        objects = [*self.code, *(self.checks if checks else ())]
        compiler = None if is_host(self.spec) else self.spec.cross_compiler
        machine_code.link(objects, path, compiler)


def build(
    program: torch.export.ExportedProgram,
    sites: Mapping[str, Site],
    codes: Mapping[str, SiteCodes],
    profiles: Mapping[str, Mapping[str, Format]],
    spec: TargetSpec,
    progress: Progress | None = None,
    tuned: Mapping[str, Schedule] | None = None,
    corrections: Mapping[str, Mapping[str, Correction]] | None = None,
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
        corrections: Profile name -> site name -> scale and bias of its own; None: all share them.

    Raises:
        LoweringError: An operator, a format or a kernel does not fit the target.
    """
    say = progress or (lambda what, done, total: None)
    steps = len(profiles) + 3
    say("import graph", 0, steps)
    target = tvm_target(spec)
    skeleton = import_program(program, spec)
    say("schedule float operators", 1, steps)
    known = {} if corrections is None else corrections
    store = WeightStore(sites, codes, families_of(spec, tuned), known)
    generic = spec.linear == "generic"  # sites are float operators too: schedule them afterwards
    if not generic:
        skeleton.module = _lower_floats(skeleton.module, spec, target)
    writer = GenericBuilder(skeleton, store) if generic else ProfileBuilder(skeleton, store)
    weights: dict[str, tuple[str, ...]] = {}
    for i, (name, formats) in enumerate(profiles.items()):
        say(f"profile {name}", 2 + i, steps)
        weights[name] = writer.add(f"profile_{name}", formats, profile=name)
        if spec.kind == "llvm":
            writer.add(f"probe_{name}", formats, profile=name, probe=True)
    say("generate machine code", 2 + len(profiles), steps)
    try:
        # LLVM finds common subexpressions itself; TVM's pass took 70 % of the compile time.
        with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
            module = writer.module()
            if generic:
                module = _lower_floats(module, spec, target)
            if spec.kind == "cuda":
                built = _machine(module, target, store, weights, profiles, spec)
            else:
                taps = [call.site for call in skeleton.site_calls()]
                built = _native(module, target, store, weights, profiles, spec, taps, writer.calls)
    except (RuntimeError, ValueError) as error:
        raise LoweringError(f"TVM cannot build the library for {spec.name!r}: {error}") from error
    say("done", steps, steps)
    return built


def _machine(
    module: Any,
    target: Any,
    store: WeightStore,
    weights: Mapping[str, tuple[str, ...]],
    profiles: Mapping[str, Mapping[str, Format]],
    spec: TargetSpec,
) -> Built:
    """Functions of TVM's virtual machine, which launches what runs on a device."""
    planned: dict[str, int] = {}
    compiler = None if is_host(spec) else spec.cross_compiler
    code = cuda.compile_module(module, target, planned, compiler)
    made = {
        name: BuiltProfile(
            function=f"profile_{name}",
            weights=weights[name],
            storage_bytes=_storage(store, weights[name], formats),
            activation_bytes=planned[f"profile_{name}"],
        )
        for name, formats in profiles.items()
    }
    return Built(made, store.tensors, spec, code)


def _native(
    module: Any,
    target: Any,
    store: WeightStore,
    weights: Mapping[str, tuple[str, ...]],
    profiles: Mapping[str, Mapping[str, Format]],
    spec: TargetSpec,
    sites: Sequence[str],
    written: Mapping[str, Sequence[KernelOf]],
) -> Built:
    """Functions that call their kernels one after the other over one arena."""
    with target:
        module = tvm.transform.Sequential(
            [
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
            ]
        )(module)
    made: dict[str, BuiltProfile] = {}
    probes: dict[str, Probe] = {}
    traces: dict[str, Trace] = {}
    kernels: dict[str, Any] = {}
    probing: dict[str, Any] = {}
    texts: list[str] = []
    checks: list[str] = []
    for name, formats in profiles.items():
        function, probe = module[f"profile_{name}"], module[f"probe_{name}"]
        tapped = flatten(probe, weights[name], store.constant, taps=len(sites))
        program = flatten(function, weights[name], store.constant, table=tapped.weights)
        layout, wider = lay_out(program), lay_out(tapped, probe=True)
        kernels |= {call.kernel: module[call.kernel] for call in program.calls}
        probing |= {call.kernel: module[call.kernel] for call in tapped.calls}
        texts.append(entry(f"profile_{name}", program, layout))
        checks.append(entry(f"probe_{name}", tapped, wider))
        checks.append(entry(f"trace_{name}", program, layout, trace=True))
        probes[name] = _probe(f"probe_{name}", sites, tapped, wider)
        called_for = _called_for(program, written[f"profile_{name}"])
        traces[name] = Trace(f"trace_{name}", *zip(*called_for, strict=True))
        made[name] = BuiltProfile(
            function=f"profile_{name}",
            weights=program.weights,
            storage_bytes=_storage(store, program.weights, formats),
            activation_bytes=layout.arena_bytes + sum(v.buffer.bytes for v in program.outputs),
            arena_bytes=layout.arena_bytes,
            reads=_reads(store, program.weights, formats),
        )
    shipped = (machine_code.kernels(kernels, target), machine_code.entries(texts, target))
    only = {name: f for name, f in probing.items() if name not in kernels}
    called = [machine_code.entries(checks, target)]
    called += [machine_code.kernels(only, target)] if only else []
    return Built(made, store.tensors, spec, shipped, tuple(called), probes, traces)


def _called_for(program: Program, written: Sequence[KernelOf]) -> list[KernelOf]:
    """The layer of each call of a program: calls that were written for layers kept their order."""
    left = list(reversed(written))
    found: list[KernelOf] = []
    for call in program.calls:
        ours = bool(left) and left[-1][0] == call.kernel
        found.append(left.pop() if ours else (call.kernel, None))
    return found


def _probe(function: str, sites: Sequence[str], program: Program, layout: Layout) -> Probe:
    taps = zip(sites, program.taps, layout.taps, strict=True)
    return Probe(
        function, layout.arena_bytes, tuple(Tap(s, v.shape, v.dtype, at) for s, v, at in taps)
    )


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


def _reads(
    store: WeightStore, names: Sequence[str], formats: Mapping[str, Format]
) -> dict[str, int]:
    """Tensors of a profile that it reads only the front of."""
    known = {t: n for site, fmt in formats.items() for t, n in store.reads(site, fmt).items()}
    return {name: known[name] for name in names if name in known}
