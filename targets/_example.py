"""How to add a target: one file of data, one line in `t3c.targets.TARGETS`, one conformance class.

This one is complete: it lowers with the portable kernels for a 64-bit RISC-V board. The suite keeps
it alive (tests/targets/test_example.py). Outside this repository the same object is announced as
an entry point instead, and then needs no line here::

    [project.entry-points."t3c.targets"]
    riscv = "my_package.riscv:RISCV"
"""

from t3c.targets.base import Roofline, TargetSpec

RISCV = TargetSpec(
    name="riscv",
    kind="llvm",
    triple="riscv64-linux-gnu",
    mcpu="generic-rv64",
    mattr=("+m", "+a", "+f", "+d", "+c"),
    arch=None,
    features=frozenset(),  # nothing beyond the baseline, so the loader checks nothing
    linear="portable",
    conv="portable",
    rank_step=16,
    vector=4,
    # A guess, and labelled so: replace it by what `RooflineModel.fit` finds on measured rows.
    roofline=Roofline(
        int8_macs_s=1e9,
        f32_macs_s=1e9,
        bytes_s=2e9,
        quantize_s=5e-9,
        store_s=5e-9,
        call_s=5e-5,
    ),
    cross_compiler="riscv64-linux-gnu-g++",
)
