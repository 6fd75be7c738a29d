"""NVIDIA GPUs; the host code is x86-64-v3, or aarch64 on Jetson."""

from dataclasses import replace

from t3c.targets.base import Roofline, TargetSpec

SM80 = TargetSpec(
    name="cuda",
    kind="cuda",
    triple=None,
    mcpu="x86-64-v3",
    mattr=(),
    arch="sm_80",
    features=frozenset({"avx2", "fma"}),
    linear="generic",
    conv="generic",
    rank_step=16,
    vector=4,
    # Not measured: a twentieth of the A100's paper peak of int8, which dp4a kernels of small
    # batches reach; bytes_s is half of its memory bandwidth (benchmarks/roofline.md).
    roofline=Roofline(
        int8_macs_s=1.5e13,
        f32_macs_s=5e12,
        bytes_s=8e11,
        quantize_s=2e-12,
        store_s=2e-12,
        call_s=5e-6,
        tile=(16, 16, 16),
    ),
)
"""A100 and every later GPU by its own machine code only: nvcc mode embeds no PTX."""

SM90 = replace(
    SM80,
    name="cuda-sm90",
    arch="sm_90",
    roofline=replace(SM80.roofline, int8_macs_s=4e13, f32_macs_s=1e13, bytes_s=1.6e12),
)
"""H100 and H200."""

JETSON = replace(
    SM80,
    name="jetson",
    triple="aarch64-linux-gnu",
    mcpu="cortex-a78",
    mattr=("+neon", "+dotprod"),
    arch="sm_87",
    features=frozenset({"asimd", "asimddp"}),
    roofline=Roofline(
        int8_macs_s=1e12,
        f32_macs_s=4e11,
        bytes_s=5e10,
        quantize_s=2e-11,
        store_s=2e-11,
        call_s=1.5e-5,
        tile=(16, 16, 16),
    ),
    cross_compiler="aarch64-linux-gnu-g++",
)
"""Jetson Orin."""
