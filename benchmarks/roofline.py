"""Measure the kernels of a CPU target on this machine and fit its roofline constants.

    python benchmarks/roofline.py x86-vnni [--rounds 30]

Prints a table of measured and predicted times, and the constants for `targets/`. One thread; the
kernels are timed without the virtual machine around them, interleaved, and the lower quartile over
rounds counts, so that a busy neighbour does not.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from t3c.codegen.families import families_of
from t3c.codegen.kernels.family import AbstractConvKernels, AbstractLinearKernels, ConvShape, Kernel
from t3c.codegen.tvm_api import compile_source, make_target, tvm
from t3c.core.codes import Matrix, quantize_weight
from t3c.core.formats import Dense, Format, LowRank
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.cost_models.base import Row
from t3c.cost_models.roofline import RooflineModel
from t3c.targets import get

LAYERS = [(m, n, k) for m in (1, 32, 128, 197) for n, k in ((768, 768), (3072, 768), (768, 3072))]
LAYERS += [(128, 384, 384), (128, 1536, 384), (128, 384, 1536), (16, 384, 384)]
CONVS = [(64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14), (512, 512, 3, 7)]
CONVS += [(256, 64, 1, 56), (64, 256, 1, 56), (1024, 256, 1, 14), (32, 64, 3, 56), (64, 32, 3, 28)]
RANKS = (64, 128, 256)


def main() -> None:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    spec = get(options.target)
    kernels = families_of(spec)
    target = make_target({"kind": spec.kind, "mcpu": spec.mcpu, "mattr": list(spec.mattr)})
    rows: list[Row] = []
    calls: list[Callable[[], None]] = []
    for m, n, k in LAYERS:
        site = LinearSite(f"{m}x{n}x{k}", n, k, m, True)
        menu: list[Format] = [Dense(), *(LowRank(r) for r in RANKS if r < min(n, k))]
        for fmt in menu:
            rows.append(Row(site, fmt))
            calls.append(linear(kernels.linear, site, fmt, target))
    for out, fan_in, kernel, size in CONVS:
        pad = (kernel // 2, kernel // 2)
        shape = ConvShape(1, fan_in, out, (size, size), (kernel, kernel), (1, 1), pad, (1, 1))
        rows.append(Row(conv_site(shape), Dense()))
        calls.append(conv(kernels.conv, shape, target))
    seconds = lower_quartile(calls, options.rounds)
    start = RooflineModel.of(spec)
    for kind in (LinearSite, ConvSite, (LinearSite, ConvSite)):
        chosen = [i for i, row in enumerate(rows) if isinstance(row.site, kind)]
        some, times = [rows[i] for i in chosen], [seconds[i] for i in chosen]
        fitted = start.fit(some, times)
        ratio = np.array(fitted.predict(some)) / np.array(times)
        print(
            f"\n{kind}: mean error {abs(ratio - 1).mean():.1%}, largest {abs(ratio - 1).max():.1%}"
        )
        print(fitted.constants)
        for row, took, r in zip(some, times, ratio, strict=True):
            print(f"  {row.site.name:24s} {row.format!s:18s} {took * 1e6:8.1f} us  x{r:.2f}")


def lower_quartile(calls: list[Callable[[], None]], rounds: int) -> list[float]:
    """Seconds of each call, interleaved round by round."""
    seen: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, seen, strict=True):
            call()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [float(np.quantile(times, 0.25)) for times in seen]


def weight(out: int, *rest: int) -> Matrix:
    """Random codes."""
    return quantize_weight(np.random.default_rng(0).standard_normal((out, *rest)).astype("float32"))


def linear(
    family: AbstractLinearKernels, site: LinearSite, fmt: Format, target: object
) -> Callable[[], None]:
    """One layer: quantize, then the product or products."""
    m, n, k = site.rows, site.n, site.k
    bias = np.zeros(n, np.float32)
    if isinstance(fmt, LowRank):
        body = family.low_rank(m, n, k, fmt.rank, fmt.rank)
        packed = family.pack_low_rank(weight(fmt.rank, k), weight(n, fmt.rank), bias)
    else:
        body = family.dense(m, n, k)
        packed = family.pack_dense(weight(n, k), bias)
    x = np.random.default_rng(1).standard_normal((m, k)).astype("float32")
    return chained(family.quantize(m, k), body, x, list(packed.values()), target)


def conv(family: AbstractConvKernels, shape: ConvShape, target: object) -> Callable[[], None]:
    """One convolution: quantize, then convolve."""
    w = weight(shape.out_channels, shape.in_channels, *shape.kernel)
    packed = family.pack(w, np.zeros(shape.out_channels, np.float32), shape)
    size = (shape.batch, shape.in_channels, *shape.in_size)
    x = np.random.default_rng(1).standard_normal(size).astype("float32")
    body = family.conv(shape)
    return chained(family.quantize(shape), body, x, list(packed.values()), target)


def chained(
    first: Kernel, body: Kernel, x: np.ndarray, packed: list[np.ndarray], target: object
) -> Callable[[], None]:
    """A call of both kernels on fixed buffers."""
    one = compile_source(first.name, first.source, target)[first.name]
    two = compile_source(body.name, body.source, target)[body.name]
    middle = [tvm.runtime.tensor(np.zeros(shape, dtype)) for shape, dtype in first.outs]
    outs = [tvm.runtime.tensor(np.zeros(shape, dtype)) for shape, dtype in body.outs]
    source = tvm.runtime.tensor(x)
    weights = [tvm.runtime.tensor(np.ascontiguousarray(w)) for w in packed]

    def call() -> None:
        one(source, *middle)
        two(*middle, *weights, *outs)

    return call


def conv_site(shape: ConvShape) -> Site:
    """The site of a kernel's shape."""
    name = f"{shape.out_channels}x{shape.in_channels}x{shape.kernel[0]}@{shape.in_size[0]}"
    return ConvSite(
        name,
        shape.out_channels,
        shape.in_channels,
        shape.kernel,
        shape.stride,
        shape.padding,
        shape.dilation,
        shape.batch,
        shape.in_size,
        shape.out_size,
        True,
    )


if __name__ == "__main__":
    main()
