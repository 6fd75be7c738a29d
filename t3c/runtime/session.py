"""A loaded artifact: pick a profile within a budget, call it, switch at any time.

Switching stores one reference. A call reads that reference once and runs to its end on the record
it read, so that concurrent switches never mix two profiles. No switch moves a weight.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from t3c.core.artifact import Artifact
from t3c.core.budget import LEVEL, Budget, DriftKind, Selector
from t3c.core.errors import ArtifactError, CertificateError, T3CError
from t3c.core.explain import Explanation, doubts, explain
from t3c.core.manifest import CompiledProfile, Manifest, TensorSpec
from t3c.core.probe import Probe, Trace
from t3c.core.profile import Label, Percentile, Profile, Timing
from t3c.core.structure import LEAF, Tree, flatten, unflatten
from t3c.runtime import host, tvm_vm
from t3c.runtime.entry import Entry, MachineEntry, NativeEntry, Scratch
from t3c.runtime.policy import Policy, opened
from t3c.runtime.threads import default_threads
from t3c.runtime.weights import ALIGNMENT, Weights, aligned_copy, aligned_empty


def load(
    artifact: str | os.PathLike[str] | Artifact,
    *,
    hashes: bool = True,
    threads: int | None = None,
    policy: bool | Literal["auto"] = False,
) -> "Session":
    """Open an artifact on this machine.

    Args:
        artifact: Its folder, or what `lower` returned.
        hashes: Compare the SHA-256 of every file; sizes and paths are checked either way.
        threads: Threads of each call, the caller among them; None: ``TVM_NUM_THREADS`` or
            ``OMP_NUM_THREADS``, else as many as the artifact's latencies were measured with, or,
            where none were, the physical cores that this process may use.
        policy: Whether `Session.set_budget` asks the learned policy that the artifact names
            (`t3c.fit_policy`), which may look at inputs; "auto": where there is one for the costs
            that are recorded now.

    Raises:
        ArtifactError: Damaged, too new, files that lead outside the folder, or there is no policy.
        TargetError: Built for another machine.
        T3CError: The policy was fitted to other costs.
        ValueError: `threads` is below 1, or `policy` is none of the three.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least 1 is needed")
    found = artifact if isinstance(artifact, Artifact) else Artifact.read(artifact)
    found.verify(hashes=hashes)
    host.check(found.manifest.target, found.library)
    return Session(found, threads, policy)


@dataclass(frozen=True, slots=True)
class Variant:
    """One profile of a session, callable like the model, whatever the session switches to.

    Attributes:
        profile: Its formats, costs and certificate.
    """

    profile: Profile
    _entry: Entry = field(repr=False)
    _session: "Session" = field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; see `Session.__call__`."""
        return self._session._run(self, args, kwargs)  # pyright: ignore[reportPrivateUsage]


class Session:
    """An artifact in memory. Safe to call and to switch from any number of threads.

    Attributes:
        path: Folder of the artifact.
        manifest: What the artifact says of itself.
        threads: Threads of each call, the caller among them. Every calling thread has workers of
            its own: sessions that are called at the same time should share the cores out.
        weight_bytes_copied: Bytes of weights that had to be copied at load; no switch adds to it.
    """

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        policy: bool | Literal["auto"] = False,
    ) -> None:
        """Load library and weights; use `t3c.load`, which also verifies the files."""
        self.path: Path = artifact.path
        self.manifest: Manifest = artifact.manifest
        self.threads = default_threads(_recorded(artifact)) if threads is None else threads
        self.weight_bytes_copied = 0
        self._library = tvm_vm.Library(artifact.library, self.manifest.target.kind)
        self._weights = Weights(artifact.weights)
        self._tensors: dict[str, Any] = {}
        self._scratch = Scratch()
        self._bind = Binder(self.manifest.input_tree, self.manifest.inputs)
        on_host = self._library.on_host
        self._expected = [Expected(spec, on_host=on_host) for spec in self.manifest.inputs]
        self._compiled = {p.profile.name: p for p in self.manifest.profiles}
        self._variants = {p.profile.name: self._variant(p) for p in self.manifest.profiles}
        self._selector = Selector(self.manifest.chain)
        self._policy = opened(artifact, policy)
        self._policy_seconds = 0.0
        self._current = self._variants[self.manifest.profiles[-1].profile.name]
        self._lock = threading.Lock()
        self._switches = 0
        self._told: set[str] = set()
        self._input_bytes_copied = 0

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """All profiles, smallest first."""
        return tuple(variant.profile for variant in self._variants.values())

    @property
    def profile(self) -> Profile:
        """The profile that the next call runs; the largest at first."""
        return self._current.profile

    @property
    def variants(self) -> Mapping[str, Variant]:
        """Profile name -> callable fixed to that profile."""
        return MappingProxyType(self._variants)

    @property
    def switches(self) -> int:
        """How often another profile was picked."""
        return self._switches

    @property
    def bytes_copied(self) -> int:
        """Bytes copied so far: weights at load, and inputs that no kernel could read in place."""
        return self.weight_bytes_copied + self._input_bytes_copied

    @property
    def policy(self) -> Policy | None:
        """The learned policy that budgets go to; None: they go to the chain."""
        return None if self._policy is None else self._policy.policy

    @property
    def policy_seconds(self) -> float:
        """Seconds that the policy has taken to choose so far, looking at inputs included."""
        return self._policy_seconds

    def set_profile(self, name: str) -> Profile:
        """Make later calls run the profile called `name`; calls under way are not disturbed.

        Raises:
            T3CError: No such profile; the message lists them.
        """
        variant = self._named(name)
        with self._lock:
            self._switches += variant is not self._current
            self._current = variant
        return variant.profile

    def set_budget(
        self,
        *,
        latency_ms: float | None = None,
        energy_mj: float | None = None,
        size_mb: float | None = None,
        ram_mb: float | None = None,
        max_drift: float | None = None,
        level: float | None = None,
        drift: DriftKind = "calibrated",
        percentile: Percentile = "p95",
        inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> Profile:
        """Make later calls run the largest profile that satisfies every limit given.

        A limit of what nobody has measured is kept by what is predicted or estimated, with a
        warning, once for each profile; one of latencies that were measured with another number of
        threads than this session's warns, too.

        A limit of drift beside others refuses that profile where its bound is above; alone, it
        picks the smallest profile whose bound keeps it.

        Args:
            latency_ms: Milliseconds of one call at `percentile`.
            energy_mj: Millijoules of one call.
            size_mb: Stored weights of the profile, 10^6 bytes.
            ram_mb: Memory while it runs, 10^6 bytes.
            max_drift: Bound on the drift ||dz||_2 of one input against the original model.
            level: Share of inputs that the bound holds for; None: 0.9.
            drift: Which bound of the certificate: "calibrated" (`t3c.certify`) or "sound".
            percentile: Which recorded latency counts: "p95" or "p50".
            inputs: Positional or keyword arguments of the next call, which the policy looks at: it
                may pick a smaller profile than the budget allows, never a larger one. The time of
                looking counts as latency.

        Returns:
            The profile.

        Raises:
            InfeasibleBudget: None fits; names the smallest feasible budget. Nothing changes.
            T3CError: `inputs` without a policy that looks at them.
        """
        budget = Budget(
            latency_ms=latency_ms,
            energy_mj=energy_mj,
            size_mb=size_mb,
            ram_mb=ram_mb,
            max_drift=max_drift,
            level=level,
            drift=drift,
            percentile=percentile,
        )
        picked = self._picked(budget, inputs)
        for text in (*doubts(picked, budget), *self._other_threads(picked, budget)):
            if text not in self._told:
                self._told.add(text)
                warnings.warn(text, stacklevel=2)
        return self.set_profile(picked.name)

    def _other_threads(self, profile: Profile, budget: Budget) -> tuple[str, ...]:
        """What is wrong with latencies of another number of threads; nothing where they agree."""
        timing = profile.latency
        if budget.latency_ms is None or timing is None or timing.label is not Label.MEASURED:
            return ()
        if timing.threads == self.threads:
            return ()
        return (
            f"latencies were measured with threads={timing.threads}, this session calls with "
            f"threads={self.threads}: load it with the former, or measure again with "
            "`t3c bench --record`",
        )

    def _picked(self, budget: Budget, inputs: Sequence[Any] | Mapping[str, Any] | None) -> Profile:
        """By the policy if there is one, else by the chain."""
        policy = self._policy
        if inputs is not None and (policy is None or policy.policy.content is None):
            raise T3CError(
                "inputs= needs a policy that looks at them: fit one with `t3c policy --looks`, and "
                "load the artifact with policy=True"
            )
        if policy is None:
            return self._selector.select(budget)
        start = time.perf_counter()
        if inputs is None:
            index = policy.index(budget)
        else:
            args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})
            index = policy.index_of(budget, [plain(x) for x in self._bind(args, kwargs)])
        self._policy_seconds += time.perf_counter() - start
        return policy.chain.profiles[index]

    def explain(self, budget: Budget) -> Explanation:
        """Which profile a budget picks, what each limit leaves, and which one binds.

        An infeasible budget is explained, too, not raised; nothing is switched.
        """
        return explain(self._selector, budget)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the current profile.

        Takes numpy arrays, torch tensors or anything else with DLPack, nested as the model's own
        arguments, or flat by position and input name. Contiguous arrays that start at a multiple
        of 64 bytes (torch's do) are read in place, others are copied once and counted.

        Returns:
            The model's own output structure; torch tensors if an input was one, else numpy arrays.

        Raises:
            TypeError: An input is missing, unknown, no array, or of another dtype.
            ValueError: An input has another shape, or is not contiguous.
        """
        return self._current(*args, **kwargs)

    def drift_bound(self, outputs: Any, level: float = LEVEL, profile: str | None = None) -> Any:
        """How far outputs may be from the original model's, for each input of the call.

        Args:
            outputs: What a call returned.
            level: Share of inputs that it holds for; one that the artifact was certified at.
            profile: Which profile was called; None: the one that the next call runs.

        Returns:
            Bounds on ||dz||_2, numpy float64 [inputs of the call].

        Raises:
            CertificateError: The profile has no such certificate, or another level.
            T3CError: No such profile.
        """
        chosen = (self._current if profile is None else self._named(profile)).profile
        if (found := chosen.certificate.per_input) is None:
            raise CertificateError(
                f"profile {chosen.name!r} has no bound for single inputs; run `t3c certify` on 200 "
                "held-out inputs or more"
            )
        flat = flatten(self.manifest.output_tree, outputs, "outputs")
        pairs = zip(self.manifest.outputs, flat, strict=True)
        floats = [np.asarray(y) for spec, y in pairs if spec.dtype.startswith("float")]
        first = self.manifest.inputs[0].shape[:1]
        whole = all(y.shape[:1] == first for y in floats)
        return found.bound(floats, level, first[0] if first and whole else 1)

    def benchmark(
        self, profile: str, inputs: Sequence[Any] | Mapping[str, Any], calls: int, warmup: int
    ) -> Timing:
        """Time calls of one profile, one after the other.

        Args:
            profile: Its name.
            inputs: Positional arguments, or keyword arguments.
            calls: Timed calls, at least 1.
            warmup: Calls before, not timed.
        """
        samples = self.samples((profile,), inputs, calls, warmup)[profile]
        return summarize(samples, self.threads)

    def samples(
        self,
        profiles: Sequence[str],
        inputs: Sequence[Any] | Mapping[str, Any],
        calls: int,
        warmup: int,
    ) -> dict[str, list[float]]:
        """Seconds of every call, profiles interleaved so that noise meets all of them alike."""
        if calls < 1:
            raise ValueError(f"calls is {calls}; at least 1 is needed")
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        times: dict[str, list[float]] = {name: [] for name in profiles}
        for call in range(-warmup, calls):
            for name in profiles:
                variant = self._named(name)
                start = time.perf_counter()
                variant(*args, **kwargs)
                if call >= 0:
                    times[name].append(time.perf_counter() - start)
        return times

    def probe(self, probe: Probe, profile: str, inputs: Sequence[Any]) -> list[Any]:
        """Outputs of a profile and, behind them, the input of every elastic layer call, in order.

        What a reference needs to check the library on this device, stretch by stretch. Only a
        library that was linked with its checks can do it.

        Args:
            probe: The profile's probe.
            profile: Its name.
            inputs: Flat inputs, in the manifest's order.

        Returns:
            Flat numpy arrays.
        """
        arena = aligned_empty((max(1, probe.arena_bytes),), np.dtype(np.uint8))
        outputs = self._run_native(probe.function, profile, inputs, arena)
        return [*outputs, *probe.read(arena)]

    def trace(
        self, trace: Trace, profile: str, inputs: Sequence[Any], calls: int = 1
    ) -> list[list[float]]:
        """Seconds of every kernel, in order, of each of several calls.

        Only a library that was linked with its checks can do it. The cycle counter of the
        processor is read between kernels, and scaled by the clock of the system.

        Args:
            trace: The profile's trace.
            profile: Its name.
            inputs: Flat inputs, in the manifest's order.
            calls: How often; the first ones are cold.
        """
        stamps = aligned_empty((len(trace.kernels) + 1,), np.dtype(np.int64))
        arena = aligned_empty((max(1, self._compiled[profile].arena_bytes or 0),), np.dtype("u1"))
        found = []
        for _ in range(calls):
            start = time.perf_counter()
            self._run_native(trace.function, profile, inputs, arena, stamps)
            seconds = time.perf_counter() - start
            cycles = np.diff(stamps).astype(float)
            found.append((cycles * (seconds / max(1.0, float(cycles.sum())))).tolist())
        return found

    def _run_native(
        self, function: str, profile: str, inputs: Sequence[Any], arena: Any, *more: Any
    ) -> list[Any]:
        """Call a function of the library that takes what a profile's function takes."""
        compiled = self._compiled[self._named(profile).profile.name]
        entry = self._native(function, compiled)
        specs = self.manifest.inputs
        given = [self._input(spec, v) for spec, v in zip(specs, inputs, strict=True)]
        outputs = [aligned_empty(s.shape, np.dtype(s.dtype)) for s in self.manifest.outputs]
        entry.run(given, *(tvm_vm.share(a) for a in (arena, *outputs, *more)))
        return outputs

    def _named(self, name: str) -> Variant:
        if (variant := self._variants.get(name)) is None:
            raise T3CError(f"no profile {name!r}; there are {', '.join(self._variants)}")
        return variant

    def _variant(self, compiled: CompiledProfile) -> Variant:
        entry: Entry
        if compiled.arena_bytes is None:
            tensors = [self._tensor(name) for name in compiled.weights]
            entry = MachineEntry(self._library, compiled.function, tensors, self.threads)
        else:
            entry = self._native(compiled.function, compiled)
        return Variant(compiled.profile, entry, self)

    def _native(self, function: str, compiled: CompiledProfile) -> NativeEntry:
        return NativeEntry(
            self._library.native(function),
            [self._tensor(name) for name in compiled.weights],
            compiled.arena_bytes or 0,
            self.manifest.outputs,
            self._scratch,
            self.threads,
        )

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            if name not in self._weights:
                raise ArtifactError(f"{self._weights.path}: has no tensor {name!r}")
            array = self._weights[name]
            tensor = tvm_vm.share(array)
            if not tvm_vm.aligned(tensor):
                self.weight_bytes_copied += array.nbytes
                tensor = tvm_vm.share(aligned_copy(array))
            self._tensors[name] = self._library.place(tensor)
        return self._tensors[name]

    def _run(self, variant: Variant, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = self._bind(args, kwargs)
        torch: Any = sys.modules.get("torch")
        as_torch = False
        inputs = []
        for expected, value in zip(self._expected, given, strict=True):
            if torch is not None and isinstance(value, torch.Tensor):
                as_torch = True
            inputs.append(expected.ready(value) or self._input(expected.spec, value))
        outputs = variant._entry(inputs, as_torch=as_torch)  # pyright: ignore[reportPrivateUsage]
        return unflatten(self.manifest.output_tree, iter(outputs))

    def _input(self, spec: TensorSpec, value: Any) -> Any:
        check_input(spec, value)
        torch: Any = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach()
        elif isinstance(value, np.ndarray) and not value.flags.writeable:
            value = self._copied(value)  # DLPack refuses read-only arrays
        tensor = tvm_vm.share(value)
        if tvm_vm.on_host(tensor):
            if not tvm_vm.aligned(tensor):
                tensor = tvm_vm.share(self._copied(tvm_vm.to_numpy(tensor)))
            return self._library.place(tensor)
        return tensor

    def _copied(self, array: Any) -> Any:
        with self._lock:
            self._input_bytes_copied += array.nbytes
        return aligned_copy(array)


class Expected:
    """One input, known well enough to recognize at a glance what needs no check and no copy."""

    def __init__(self, spec: TensorSpec, *, on_host: bool) -> None:
        """Take what the manifest says; arrays of a library for another device are never ready."""
        self.spec = spec
        self._shape, self._dtype = spec.shape, np.dtype(spec.dtype)
        self._on_host = on_host

    def ready(self, value: Any) -> Any | None:
        """A TVM tensor over a numpy array that kernels can read as it is; None: look closer."""
        if type(value) is not np.ndarray or not self._on_host:
            return None
        flags = value.flags
        if value.dtype != self._dtype or value.shape != self._shape:
            return None
        if not (flags.c_contiguous and flags.writeable):
            return None
        tensor = tvm_vm.share(value)
        return tensor if tvm_vm.aligned(tensor) else None


class Binder:
    """Finds the flat inputs in the arguments of a call."""

    def __init__(self, tree: Tree, specs: Sequence[TensorSpec]) -> None:
        """Take the nesting of the model's arguments and the names of its flat inputs."""
        self._tree = tree
        self._names = [spec.name for spec in specs]
        positional, named = tree["items"]
        self._plain = not named["items"] and all(part == LEAF for part in positional["items"])

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The inputs in order: as the model nests them, else flat by position and name.

        Raises:
            TypeError: Neither fits.
        """
        if self._plain and not kwargs and len(args) == len(self._names):
            return list(args)
        try:
            return flatten(self._tree, (args, kwargs), "arguments")
        except TypeError as error:
            return self._by_name(args, kwargs, error)

    def _by_name(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: TypeError
    ) -> list[Any]:
        given = dict(zip(self._names, args, strict=False)) | dict(kwargs)
        hint = f"; this model takes {', '.join(self._names)} ({error})"
        if len(args) + len(kwargs) > len(given):
            raise TypeError(f"{len(args)} positional and {list(kwargs)} named inputs overlap{hint}")
        if unknown := [name for name in given if name not in self._names]:
            raise TypeError(f"unknown input {unknown[0]!r}{hint}")
        if missing := [name for name in self._names if name not in given]:
            raise TypeError(f"missing input {missing[0]!r}{hint}")
        return [given[name] for name in self._names]


def check_input(spec: TensorSpec, value: Any) -> None:
    """Refuse what the compiled function does not take.

    Raises:
        TypeError: No array, or another dtype.
        ValueError: Another shape, or not contiguous.
    """
    try:
        shape = tuple(int(size) for size in value.shape)
        dtype = str(value.dtype).removeprefix("torch.")
    except (AttributeError, TypeError):
        raise TypeError(
            f"input {spec.name!r}: expected a {spec.dtype} array, got {type(value).__name__}"
        ) from None
    if dtype != spec.dtype:
        hint = ""
        if {dtype, spec.dtype} == {"int32", "int64"}:
            hint = f"; convert it: numpy x.astype({spec.dtype!r}), torch x.to(torch.{spec.dtype})"
        raise TypeError(f"input {spec.name!r}: expected {spec.dtype}, got {dtype}{hint}")
    if shape != spec.shape:
        raise ValueError(
            f"input {spec.name!r}: expected shape {list(spec.shape)}, got {list(shape)}; "
            "shapes were fixed by the example inputs of lower()"
        )
    if not _contiguous(value):
        raise ValueError(
            f"input {spec.name!r}: not contiguous; try numpy.ascontiguousarray(x) or x.contiguous()"
        )


def plain(value: Any) -> Any:
    """A numpy view of an input."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return value.detach().numpy()
    return np.asarray(value)


def _contiguous(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.flags.c_contiguous
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return bool(value.is_contiguous())
    return bool(tvm_vm.share(value).is_contiguous())


def _recorded(artifact: Artifact) -> int | None:
    """Threads that the largest profile's latency was measured with; None: it was not."""
    timing = artifact.manifest.profiles[-1].profile.latency
    return timing.threads if timing is not None and timing.label is Label.MEASURED else None


def summarize(samples: Sequence[float], threads: int) -> Timing:
    """Median and 95th percentile of measured seconds of calls on so many threads."""
    p50, p95 = np.percentile(samples, (50, 95))
    return Timing(float(p50), float(p95), Label.MEASURED, len(samples), threads)


__all__ = ["ALIGNMENT", "Binder", "Session", "Variant", "check_input", "load", "summarize"]
