"""What is done with a library where it can run: every profile proved, layers and profiles timed."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t3c import targets
from t3c.codegen.build import Built, is_host
from t3c.controller.plan import Plan
from t3c.controller.verdict import Verdicts, judge
from t3c.core.conservative import increasing
from t3c.core.errors import ParityError, TargetError
from t3c.core.manifest import CompiledProfile, Manifest, Parity, Stages, Where
from t3c.core.objective import Objective
from t3c.core.probe import Probe
from t3c.elastic.model import ElasticModel
from t3c.elastic.shadow import relative, shadow
from t3c.runtime import bundle, emulate
from t3c.runtime.session import Session, load, summarize
from t3c.targets import TargetSpec

Progress = Callable[[str, int, int], None]
Batch = tuple[Tensor, ...]

TOLERANCE = 1e-2
"""Relative L2 error allowed between the library and the fake-quantized torch reference, on any
stretch between two roundings (t3c.elastic.shadow)."""
PARITY_INPUTS = 2
"""Calibration inputs on which every profile is proved."""
WARMUP = 5
"""Calls before the timed ones."""
TIMING_SECONDS = 20.0
"""All profiles together are timed no longer than this, but at least `LEAST_CALLS` times."""
LEAST_CALLS = 20
TRACE_SECONDS = 4.0
"""Layers are timed no longer than this, but in at least `LEAST_TURNS` turns."""
TRACE_WARMUP, LEAST_TURNS, TRACE_TURNS = 2, 9, 40
"""Turns of all profiles: not counted, at least, and at most."""
SLOWER = 1.03
"""Median ratio to the dense profile above which a profile counts as slower; 3 % is noise."""


@dataclass(slots=True)
class Notes:
    """What was assumed: told once, kept for the manifest.

    Attributes:
        say: Told every line; None: standard error.
        lines: All lines so far.
    """

    say: Callable[[str], None] | None
    lines: list[str] = field(default_factory=list)

    def add(self, *lines: str) -> None:
        """Tell and keep lines."""
        for line in lines:
            self.lines.append(line)
            if self.say is None:
                print(f"t3c: {line}", file=sys.stderr)
            else:
                self.say(line)


def runs_here(spec: TargetSpec) -> bool:
    """Whether this machine is such a device."""
    return spec.kind == "llvm" and is_host(spec) and spec.features <= targets.cpu_features()


def _emulator(spec: TargetSpec, notes: Notes) -> emulate.Machine | None:
    """The emulated device; None where there is none or a tool is missing, which is told."""
    if spec.emulator is None:
        notes.add(f"{spec.name}: no such device here; built, not run; times are predicted")
        return None
    try:
        machine = emulate.machine(spec)
    except TargetError as error:
        notes.add(f"{spec.name}: built, not run; times are predicted. To check it here: {error}")
        return None
    notes.add(f"{spec.name}: checked under emulation; times are predicted")
    return machine


@dataclass(frozen=True, slots=True)
class Bench:
    """Runs what was built, where it can run.

    Attributes:
        elastic: The reference.
        spec: The target.
        batches: Calibration inputs, flat.
        calls: Most timed calls of a profile.
        threads: Of one call; None: the session's default.
        notes: Told what was assumed.
        progress: Called with (what, done, total).
    """

    elastic: ElasticModel
    spec: TargetSpec
    batches: Sequence[Batch]
    calls: int
    threads: int | None
    notes: Notes
    progress: Progress | None

    def prove(
        self, manifest: Manifest, built: Built, scratch: Path
    ) -> tuple[Manifest, Session | None]:
        """What is known of a library once every profile was proved; a session on this machine.

        Args:
            manifest: What was built.
            built: The library.
            scratch: Folder for drafts.

        Raises:
            ParityError: A profile does not compute what its torch reference computes.
        """
        manifest = replace(manifest, stages=Stages(built=True))
        here = runs_here(self.spec)
        machine = None if here else _emulator(self.spec, self.notes)
        if not here and machine is None:
            return manifest, None
        scratch.mkdir()
        checks = scratch / "checks.so"
        built.save(checks, checks=True)  # the same machine code, and the probes
        draft = bundle.write(scratch / "draft", manifest, checks, built.tensors)
        prove = _Proof(self.elastic, built.probes, self.batches[:PARITY_INPUTS], self.progress)
        if machine is not None:
            return prove(manifest, emulate.Emulated(draft, machine).probe, "emulated"), None
        session = load(draft, hashes=False, threads=self.threads)
        return prove(manifest, session.probe, "device"), session

    def layers(self, chosen: Plan, built: Built, session: Session) -> Verdicts:
        """Formats against the dense form of their layers, the profiles traced in turn."""
        names = [p.name for p in chosen.chain]
        turns: dict[str, list[list[float]]] = {name: [] for name in names}
        limit = time.monotonic() + TRACE_SECONDS
        for turn in range(-TRACE_WARMUP, TRACE_TURNS):
            if self.progress is not None:
                self.progress("time layers", max(0, turn), TRACE_TURNS)
            if turn >= LEAST_TURNS and time.monotonic() > limit:
                break
            for name in names:
                (seconds,) = session.trace(built.traces[name], name, self.batches[0])
                if turn >= 0:
                    turns[name].append(seconds)
        times = {n: _by_site(built.traces[n].sites, np.array(turns[n])) for n in names}
        return judge([(p.name, p.formats) for p in chosen.chain], times)

    def timed(self, manifest: Manifest, session: Session) -> Manifest:
        """Measure every profile, interleaved; the measurement wins over the prediction.

        Where the objective is latency, a profile that takes longer than the largest, dense one is
        dropped; one that was chosen for another cost stays, with its time.
        """
        if self.progress is not None:
            self.progress("time profiles", 0, 1)
        names = [c.profile.name for c in manifest.profiles]
        specs = zip(manifest.inputs, self.batches[0], strict=True)
        inputs = {spec.name: tensor for spec, tensor in specs}
        trial = session.samples(names, inputs, 2, WARMUP)
        each = sum(min(seconds) for seconds in trial.values())
        rounds = max(min(self.calls, LEAST_CALLS), min(self.calls, int(TIMING_SECONDS / each)))
        samples = {n: np.array(s) for n, s in session.samples(names, inputs, rounds, 0).items()}
        kept = []
        for compiled in manifest.profiles:
            name = compiled.profile.name
            ratio = float(np.median(samples[name] / samples[names[-1]]))  # of calls side by side
            slow = f"{ratio:.2f} times as long as {names[-1]!r}"
            if ratio > SLOWER and manifest.objective is Objective.LATENCY:
                self.notes.add(f"dropped profile {name!r}: it took {slow}")
                continue
            if ratio > SLOWER:
                self.notes.add(
                    f"profile {name!r} took {slow}; it stays, the chain is for {manifest.objective}"
                )
            latency = summarize(samples[name].tolist(), session.threads)
            kept.append(replace(compiled, profile=replace(compiled.profile, latency=latency)))
        return replace(manifest, profiles=increasing(kept))


def _by_site(
    sites: Sequence[str | None], seconds: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Seconds [turns, kernels] as site name -> seconds [turns]."""
    columns = np.array([s or "" for s in sites])
    return {s: seconds[:, columns == s].sum(1) for s in dict.fromkeys(sites) if s is not None}


@dataclass(frozen=True, slots=True)
class _Proof:
    """Runs every profile against its fake-quantized torch reference."""

    elastic: ElasticModel
    probes: Mapping[str, Probe]
    batches: Sequence[Batch]
    progress: Progress | None

    def __call__(
        self, manifest: Manifest, probe: Callable[[Probe, str, Batch], list[Any]], where: Where
    ) -> Manifest:
        """The manifest with parity and stages.

        Args:
            manifest: What was built.
            probe: Calls a profile's probe function: outputs, then the inputs of the layers.
            where: What ran it.

        Raises:
            ParityError: Names the profile, the place and the error.
        """
        proved = []
        for i, compiled in enumerate(manifest.profiles):
            if self.progress is not None:
                self.progress("prove profiles", i, len(manifest.profiles))
            proved.append(replace(compiled, parity=self._parity(compiled, manifest, probe, where)))
        stages = Stages(built=True, loaded=True, ran=True, verified=True, where=where)
        return replace(manifest, profiles=tuple(proved), stages=stages)

    def _parity(
        self,
        compiled: CompiledProfile,
        manifest: Manifest,
        probe: Callable[[Probe, str, Batch], list[Any]],
        where: Where,
    ) -> Parity:
        profile, elastic = compiled.profile, self.elastic
        worst = free = 0.0
        one = self.probes[profile.name]
        taps = [tap.site for tap in one.taps]
        with elastic.using(profile.formats), torch.inference_mode():
            for batch in self.batches:
                flat = [torch.from_numpy(a) for a in probe(one, profile.name, batch)]
                outputs = {s.name: y for s, y in zip(manifest.outputs, flat, strict=False)}
                seen = shadow(elastic, batch, taps, flat[len(outputs) :], outputs)
                if not seen.worst <= TOLERANCE:
                    raise ParityError(
                        f"profile {profile.name!r}, at {seen.where!r}: relative error "
                        f"{seen.worst:.3g} against the torch reference, allowed is {TOLERANCE:g}; "
                        "nothing was written. Exclude that layer by glob and report the error."
                    )
                worst = max(worst, seen.worst)
                alone = zip(outputs.values(), elastic.graph(*batch), strict=True)
                free = max(free, *(relative(got, want) for got, want in alone))
        return Parity(worst, free, TOLERANCE, len(self.batches), where)
