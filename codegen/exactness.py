"""Proof on this machine that the integer accumulators of a library's kernels are exact."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.families import families_of
from t3c.codegen.kernels.family import Flow, Image, Kernel
from t3c.codegen.script import read_function
from t3c.codegen.tvm_api import tvm
from t3c.codegen.weights import ConvStep, Families, conv_steps
from t3c.core import ops
from t3c.core.codes import F32, Grouped, Matrix, Nested, SiteCodes
from t3c.core.formats import Format, LowRank
from t3c.core.grid import Grid
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.targets.base import TargetSpec


@dataclass(frozen=True, slots=True)
class Check:
    """One product of one site, on random activations and the site's own weight codes.

    Attributes:
        site: Where the weights are from.
        kernel: The raw kernel.
        accumulators: How many were compared.
        wrong: How many differ from the exact integer.
    """

    site: str
    kernel: str
    accumulators: int
    wrong: int


@dataclass(frozen=True, slots=True)
class _Case:
    site: str
    quantize: Kernel
    raw: Kernel
    x: F32
    weights: tuple[NDArray[np.generic], ...]
    exact: NDArray[np.int32]
    range: F32 | None = None
    """Of a fixed grid; None: the activations' scales come from the quantizing kernel."""


def check_accumulators(
    sites: Mapping[str, Site],
    codes: Mapping[str, SiteCodes],
    formats: Mapping[str, Format],
    spec: TargetSpec,
) -> list[Check]:
    """Compare every distinct product of a profile with exact integer arithmetic.

    Args:
        sites: Site name -> site.
        codes: Site name -> its integer weights.
        formats: Site name -> format of the profile.
        spec: A target that this machine can run.
    """
    families = families_of(spec)
    cases: dict[str, _Case] = {}
    rng = np.random.default_rng(0)
    for name, fmt in formats.items():
        for case in _cases(sites[name], codes[name], fmt, families, rng):
            cases.setdefault(case.raw.name, case)
    kernels = {k.name: k for case in cases.values() for k in (case.quantize, case.raw)}
    module = tvm.IRModule({name: read_function(k.source) for name, k in kernels.items()})
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        library = tvm.compile(module, target=tvm.target.Target({"kind": "llvm", "mcpu": spec.mcpu}))
    return [_run(case, library) for case in cases.values()]


def _cases(
    site: Site, codes: SiteCodes, fmt: Format, families: Families, rng: np.random.Generator
) -> Iterator[_Case]:
    if isinstance(site, LinearSite):
        four = fmt.bits == 4
        low, high = (codes.low4, codes.high4) if four else (codes.low, codes.high)
        dense = codes.dense4 if four else codes.dense if codes.nested is None else codes.nested
        parts: list[Matrix | Grouped | Nested]
        if isinstance(fmt, LowRank) and low is not None and high is not None:
            parts = [low.prefix(rows=fmt.rank), high.prefix(cols=fmt.rank)]
        else:
            parts = [] if dense is None else [dense]
        for part in parts:
            yield _linear_case(site, part, families, rng)
    else:
        for step in conv_steps(site, codes, fmt):
            if isinstance(step, ConvStep):
                yield _conv_case(site, step, families, rng)


def _linear_case(
    site: LinearSite, w: Matrix | Grouped | Nested, families: Families, rng: np.random.Generator
) -> _Case:
    n, k = (w.fine if isinstance(w, Nested) else w.q).shape
    x = rng.standard_normal((site.rows, k), dtype=np.float32)
    bias = np.zeros(n, np.float32)
    if isinstance(w, Nested):
        four = families.grouped()
        raw = four.nested(site.rows, n, k, raw=True)
        fine = {f"fine {name}": value for name, value in four.pack_fine(w).items()}
        packed = four.pack_dense(w.coarse, bias) | fine
        exact = ops.group_accumulators(x, w.whole).reshape(-1, n)
    elif isinstance(w, Grouped):
        raw = families.grouped().dense(site.rows, n, k, raw=True)
        packed = families.grouped().pack_dense(w, bias)
        exact = ops.group_accumulators(x, w).reshape(-1, n)
    else:
        q, _ = ops.quantize(x, (1,))
        raw = families.linear.dense(site.rows, n, k, raw=True)
        packed = families.linear.pack_dense(w, bias)
        # integers below 2^53: exact
        exact = (q.astype(np.float64) @ w.q.astype(np.float64).T).astype(np.int32)
    quantize = families.linear.quantize(site.rows, k)
    return _Case(site.name, quantize, raw, x, tuple(packed.values()), exact)


def _conv_case(
    site: ConvSite, step: ConvStep, families: Families, rng: np.random.Generator
) -> _Case:
    shape = step.shape
    size = (shape.batch, shape.in_channels, *shape.in_size)
    used = step.codes.prefix(rows=shape.out_channels, cols=shape.in_channels)
    packed = families.conv.pack(step.codes, step.bias, shape)
    if families.conv.static:
        image = Image(
            shape.batch,
            shape.in_channels,
            shape.in_size,
            max(shape.padding),
            signed=False,
            bits=families.conv.activation_bits,
        )
        whole = rng.integers(0, image.ends[1] + 1, size).astype(np.float32)
        return _Case(
            site.name,
            families.conv.encode(image),
            families.conv.flow(Flow(shape, image, None), step.channels_max, raw=True),
            whole,
            tuple(packed.values()),
            _conv_accumulators(whole.astype(np.int16), used, step),
            Grid(1.0, image.signed, image.bits).array(),
        )
    x = rng.standard_normal(size, dtype=np.float32)
    q, _ = ops.quantize(x, (1, 2, 3))
    return _Case(
        site.name,
        families.conv.quantize(shape),
        families.conv.conv(shape, step.channels_max, raw=True),
        x,
        tuple(packed.values()),
        _conv_accumulators(q, used, step),
    )


def _conv_accumulators(
    q: NDArray[np.signedinteger], w: Matrix, step: ConvStep
) -> NDArray[np.int32]:
    """Exact int32 sums of a convolution of codes q, through float64 matrix products."""
    shape = step.shape
    pad = [(0, 0), (0, 0), *((p, p) for p in shape.padding)]
    padded = np.pad(q.astype(np.float64), pad)
    (oh, ow), (sh, sw), (dh, dw) = shape.out_size, shape.stride, shape.dilation
    total = np.zeros((shape.batch, shape.out_channels, oh * ow))
    for i in range(shape.kernel[0]):
        for j in range(shape.kernel[1]):
            rows = slice(i * dh, i * dh + sh * (oh - 1) + 1, sh)
            cols = slice(j * dw, j * dw + sw * (ow - 1) + 1, sw)
            seen = padded[:, :, rows, cols].reshape(shape.batch, shape.in_channels, -1)
            total += w.q[:, :, i, j].astype(np.float64) @ seen
    return total.reshape(shape.batch, shape.out_channels, oh, ow).astype(np.int32)


def _run(case: _Case, library: Any) -> Check:
    codes = [tvm.runtime.tensor(np.zeros(s, d)) for s, d in case.quantize.outs]
    given = [tvm.runtime.tensor(a) for a in (case.x, case.range) if a is not None]
    library[case.quantize.name](*given, *codes)
    codes += given[1:]
    (shape, dtype), *_ = case.raw.outs
    out = tvm.runtime.tensor(np.zeros(shape, dtype))
    library[case.raw.name](*codes, *(tvm.runtime.tensor(w) for w in case.weights), out)
    wrong = int((out.numpy().reshape(case.exact.shape) != case.exact).sum())
    return Check(case.site, case.raw.name, case.exact.size, wrong)
