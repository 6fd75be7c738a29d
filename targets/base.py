"""What T3C knows of a device family: pure data."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Roofline:
    """Constants of the first latency estimate, per thread. Source: benchmarks/roofline.md.

    Attributes:
        int8_macs_s: Sustained int8 multiply-adds per second in the matrix kernels.
        f32_macs_s: Sustained float32 multiply-adds per second in everything else.
        bytes_s: Sustained memory bytes per second.
        quantize_s: Seconds per input element quantized.
        store_s: Seconds per output element dequantized and stored.
        call_s: Seconds per kernel call.
        tile: (rows, outputs, inputs) that the int8 kernels compute at once: sizes round up to it.
        int4_macs_s: Sustained multiply-adds per second with 4-bit weights, whose kernels take every
            row alone; None: the target has no such kernels.
    """

    int8_macs_s: float
    f32_macs_s: float
    bytes_s: float
    quantize_s: float
    store_s: float
    call_s: float
    tile: tuple[int, int, int] = (1, 1, 1)
    int4_macs_s: float | None = None


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """One device to lower for.

    Attributes:
        name: What the user writes, for example ``x86`` or ``x86-vnni``.
        kind: TVM target kind: ``llvm`` or ``cuda``.
        triple: LLVM triple of the host code; None is this machine's.
        mcpu: LLVM processor name.
        mattr: LLVM features, for example ``("+neon", "+dotprod")``.
        arch: CUDA architecture, for example ``sm_80``; None for a CPU.
        features: CPU features that the library uses (names of /proc/cpuinfo); the loader checks.
        linear: Name of the linear kernel family.
        conv: Name of the convolution kernel family.
        rank_step: Ranks on the menu are multiples of this.
        vector: Float32 lanes of a vector register.
        roofline: Constants of the latency estimate.
        cross_compiler: Linker for a foreign triple; None links for this machine.
        emulator: User-mode emulator that can run the library here; None if none.
    """

    name: str
    kind: str
    triple: str | None
    mcpu: str
    mattr: tuple[str, ...]
    arch: str | None
    features: frozenset[str]
    linear: str
    conv: str
    rank_step: int
    vector: int
    roofline: Roofline
    cross_compiler: str | None = None
    emulator: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
