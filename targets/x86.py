"""x86-64 in four levels, best first; the name ``x86`` takes the best one that this machine has."""

from t3c.targets.base import Roofline, TargetSpec

_V3 = frozenset({"sse2", "avx", "avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm", "popcnt"})
_AVX512 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = _AVX512 | {"avx512_vnni", "avx512_vbmi2", "avx512_bitalg", "avx512ifma", "avx512vbmi"}

AMX = TargetSpec(
    name="x86-amx",
    kind="llvm",
    triple=None,
    mcpu="sapphirerapids",
    mattr=(),
    arch=None,
    features=_VNNI | {"amx_tile", "amx_int8", "avx512_bf16", "avx512_fp16", "avx_vnni"},
    linear="x86-amx",
    conv="x86-amx",
    rank_step=64,
    vector=16,
    # Fitted to 17 measured products of 197 and 128 rows: mean error 6 %, largest 14 %
    # (benchmarks/roofline.md). call_s is the virtual machine's, measured apart.
    roofline=Roofline(
        int8_macs_s=1.55e12,
        f32_macs_s=6e10,
        bytes_s=2.74e10,
        quantize_s=2.99e-10,
        store_s=2.12e-10,
        call_s=7e-6,
        tile=(16, 16, 64),
        int4_macs_s=3.2e11,  # as on VNNI
    ),
)
"""Sapphire Rapids and later: AMX int8 tiles."""

VNNI = TargetSpec(
    name="x86-vnni",
    kind="llvm",
    triple=None,
    mcpu="icelake-server",
    mattr=(),
    arch=None,
    features=_VNNI,
    linear="x86-vnni",
    conv="x86-vnni",
    rank_step=16,
    vector=16,
    # Fitted to measured kernels of 128 and 197 rows: mean error 14 %, largest 50 %
    # (benchmarks/roofline.md).
    roofline=Roofline(
        int8_macs_s=4.15e11,
        f32_macs_s=6e10,
        bytes_s=3.4e10,
        quantize_s=2.0e-10,
        store_s=1.2e-10,
        call_s=7e-6,
        tile=(1, 16, 4),
        int4_macs_s=3.2e11,  # .9 of the int8 kernels were measured, warm; .77 is on the safe side
    ),
)
"""Ice Lake server and later: AVX-512 with VNNI."""

AVX_VNNI = TargetSpec(
    name="x86-avx-vnni",
    kind="llvm",
    triple=None,
    mcpu="x86-64-v3",
    mattr=("+avxvnni",),
    arch=None,
    features=_V3 | {"avx_vnni"},
    linear="x86-avx-vnni",
    conv="x86-avx-vnni",
    rank_step=16,
    vector=8,
    # Not measured: a quarter of the paper peak of vpdpbusd on 256 bits at 3 GHz.
    roofline=Roofline(
        int8_macs_s=9.6e10,
        f32_macs_s=3e10,
        bytes_s=1.5e10,
        quantize_s=6e-10,
        store_s=4e-10,
        call_s=7e-6,
        tile=(1, 16, 4),
        int4_macs_s=4.8e10,
    ),
)
"""Alder Lake and later: the dot products of VNNI without AVX-512."""

AVX2 = TargetSpec(
    name="x86-avx2",
    kind="llvm",
    triple=None,
    mcpu="x86-64-v3",
    mattr=(),
    arch=None,
    features=_V3,
    linear="x86-avx2",
    conv="x86-avx2",
    rank_step=16,
    vector=8,
    # Not measured: half of the paper peak of vpmaddwd at 3 GHz (benchmarks/roofline.md).
    roofline=Roofline(
        int8_macs_s=4.8e10,
        f32_macs_s=3e10,
        bytes_s=1.5e10,
        quantize_s=6e-10,
        store_s=4e-10,
        call_s=7e-6,
        tile=(1, 8, 2),
        int4_macs_s=4.8e10,  # 1.3 times the int8 kernels were measured, warm
    ),
)
"""Haswell and later."""

BASELINE = TargetSpec(
    name="x86-64",
    kind="llvm",
    triple=None,
    mcpu="x86-64",
    mattr=(),
    arch=None,
    features=frozenset({"sse2"}),
    linear="portable",
    conv="portable",
    rank_step=16,
    vector=4,
    # Not measured: a quarter of AVX2's (half the lanes, one product unit less).
    roofline=Roofline(
        int8_macs_s=1.2e10,
        f32_macs_s=8e9,
        bytes_s=1e10,
        quantize_s=2e-9,
        store_s=1e-9,
        call_s=7e-6,
        tile=(1, 4, 2),
        int4_macs_s=6e9,
    ),
)
"""Every x86-64 processor."""

LEVELS = (AMX, VNNI, AVX_VNNI, AVX2, BASELINE)
