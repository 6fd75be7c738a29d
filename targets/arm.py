"""64-bit ARM Linux: with and without the int8 dot product."""

from dataclasses import replace

from t3c.targets.base import Roofline, TargetSpec

DOTPROD = TargetSpec(
    name="arm",
    kind="llvm",
    triple="aarch64-linux-gnu",
    mcpu="cortex-a76",
    mattr=("+neon", "+dotprod"),
    arch=None,
    features=frozenset({"asimd", "asimddp"}),
    linear="arm-sdot",
    conv="portable",
    rank_step=16,
    vector=4,
    # Not measured: half of the paper peak of two SDOT units at 2.4 GHz (benchmarks/roofline.md).
    roofline=Roofline(
        int8_macs_s=3.8e10,
        f32_macs_s=1e10,
        bytes_s=8e9,
        quantize_s=1.2e-9,
        store_s=8e-10,
        call_s=1.5e-5,
        tile=(1, 4, 4),
        int4_macs_s=2.5e10,
    ),
    cross_compiler="aarch64-linux-gnu-g++",
    emulator="qemu-aarch64-static",
)
"""Cortex-A76 and later (Raspberry Pi 5, most phones since 2019): SDOT."""

NEON = replace(
    DOTPROD,
    name="arm-neon",
    mcpu="cortex-a72",
    mattr=("+neon",),
    features=frozenset({"asimd"}),
    linear="portable",
    # Not measured: half of the paper peak of one SMLAL unit at 1.5 GHz.
    roofline=Roofline(
        int8_macs_s=6e9,
        f32_macs_s=3e9,
        bytes_s=4e9,
        quantize_s=2.5e-9,
        store_s=1.5e-9,
        call_s=3e-5,
        tile=(1, 4, 1),
        int4_macs_s=3e9,
    ),
)
"""Every aarch64 processor (Raspberry Pi 4)."""

LEVELS = (DOTPROD, NEON)
