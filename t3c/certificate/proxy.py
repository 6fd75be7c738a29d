"""First-order estimates of the drift of a profile: the paper's proxy and sharper relatives.

The paper's form is sum over layers of L ||dW||_2 alpha: L the Jacobian norm from the layer's output
to the outputs, dW what rank and rounding together change in the weight, alpha the RMS norm of the
layer's input. With activations x of the compressed model before the layer and the original model
behind it, the layers' changes telescope, so that their sum is the drift to first order. Rounding of
activations adds a term of its own: the RMS norm of what it changes in the layer's output, with the
same gain. Source: Lamaakal et al., arXiv 2601.01299, abstract and introduction.

Variants: ``jacobian-rms`` has RMS ||dW x|| for ||dW|| alpha; ``kronecker`` is sqrt(tr(G dW C dW^T))
with the second moments C of inputs and G of gradients, so that directions count; names with
``-rss`` take the root of the sum of squares over layers; ``measured`` combines measured drifts of
one layer each that way. None is a bound.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from t3c.certificate.gains import Gains, calls_of, gains, rows_of
from t3c.certificate.outputs import Batch, float_outputs, samples_in
from t3c.certificate.residual import apply, effective, operator_norm
from t3c.core.certificate import MEASURED, PAPER, SQUARED, Estimate, Proxy, Share
from t3c.core.errors import CertificateError
from t3c.core.formats import Format
from t3c.core.profile import ProfileChain
from t3c.elastic.layer import ElasticLayer
from t3c.elastic.model import ElasticModel

Damage = Mapping[str, Mapping[Format, float]]
"""Site -> format -> relative squared drift of the outputs with only that layer changed."""
OF_NO_LAYER = (PAPER, "jacobian-rms", "jacobian-rms-rss", "kronecker", "kronecker-rss")
"""Variants, all zero, where no layer is elastic."""
DRAWS = 3
"""Disjoint draws of the inputs, between which the spread of alpha is told."""


@dataclass(slots=True)
class _Seen:
    """Sums over inputs at one site: squared norms, and outer products of errors."""

    inputs: int = 0
    x: float = 0.0
    weight: float = 0.0
    rounding: float = 0.0
    weight_gram: Tensor | None = None
    rounding_gram: Tensor | None = None
    alphas: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Against:
    """The estimates of one choice of formats against one reference, layer by layer.

    Attributes:
        shares: Site -> its part.
        totals: Variant -> (total, the same without rounding of activations).
        spread: See `Proxy`.
        inputs: Inputs behind the norms.
    """

    shares: Mapping[str, Share]
    totals: Mapping[str, tuple[float, float]]
    spread: float
    inputs: int


class Meter:
    """Estimates drift for any choice of formats; gains and norms are computed once.

    Attributes:
        gains: Of every site.
        calls: Node -> layer, wherever the graph calls one.
    """

    def __init__(
        self,
        elastic: ElasticModel,
        batches: Sequence[Batch],
        *,
        seconds: float = math.inf,
        damage: Damage | None = None,
        known: Gains | None = None,
    ) -> None:
        """Differentiate the original.

        Args:
            elastic: The calibrated model.
            batches: Flat inputs, as the graph takes them: a few of the calibration data.
            seconds: Time for gains.
            damage: For ``measured``; None leaves that variant out.
            known: Gains from an earlier meter of the same original, whose formats were others; they
                are not computed again. None: they are computed.

        Raises:
            CertificateError: No batches.
        """
        if not batches:
            raise CertificateError("a proxy needs at least one batch of inputs; got none")
        self.elastic = elastic
        self.batches = batches
        self.gains = gains(elastic, batches, seconds=seconds) if known is None else known
        self.calls = calls_of(elastic)
        self._damage = damage
        self._weights: dict[tuple[str, Format | None], Tensor] = {}
        self._norms: dict[tuple[str, Format | None, Format | None], float] = {}
        self._size = self._output_norm() if damage is not None else 0.0

    def against(
        self,
        formats: Mapping[str, Format],
        reference: Mapping[str, Format] | None = None,
        *,
        activations: bool = True,
    ) -> Against:
        """Estimates of one choice of formats.

        Args:
            formats: Site name -> format, for every site.
            reference: Formats to compare with; None: the original.
            activations: Whether activations are rounded as kernels do; False: weights alone.
        """
        seen = self._observe(formats, reference, activations)
        shares: dict[str, Share] = {}
        weights: dict[str, dict[str, float]] = {}
        for site, fmt in formats.items():
            of_weight = self._weight_terms(site, fmt, _at(reference, site), seen[site])
            of_rounding = self._rounding_terms(site, seen[site])
            damage = self._measured(site, fmt, _at(reference, site))
            both = {name: value + of_rounding[name] for name, value in of_weight.items()}
            for name in SQUARED & both.keys():
                both[name] = math.hypot(of_weight[name], of_rounding[name])
            if damage is not None:
                both[MEASURED] = of_weight[MEASURED] = damage
            weights[site] = of_weight
            shares[site] = Share(
                self.gains.norm[site],
                self._residual(site, fmt, _at(reference, site)),
                _rms(seen[site].x, seen[site].inputs),
                _rms(seen[site].rounding, seen[site].inputs),
                both,
            )
        names = list(next(iter(weights.values()), OF_NO_LAYER))
        totals = {
            name: (
                _combined(name, [s.estimates[name] for s in shares.values()]),
                _combined(name, [w[name] for w in weights.values()]),
            )
            for name in names
        }
        spread = max((_spread(s.alphas) for s in seen.values()), default=0.0)
        return Against(shares, totals, spread, max((s.inputs for s in seen.values()), default=0))

    def _weight_terms(
        self, site: str, fmt: Format, other: Format | None, seen: _Seen
    ) -> dict[str, float]:
        gain = self.gains.norm[site]
        rms = gain * _rms(seen.weight, seen.inputs)
        kronecker = self._kronecker(site, seen.weight_gram, seen.inputs)
        return {
            PAPER: gain * self._residual(site, fmt, other) * _rms(seen.x, seen.inputs),
            "jacobian-rms": rms,
            "jacobian-rms-rss": rms,
            "kronecker": kronecker,
            "kronecker-rss": kronecker,
        }

    def _rounding_terms(self, site: str, seen: _Seen) -> dict[str, float]:
        rms = self.gains.norm[site] * _rms(seen.rounding, seen.inputs)
        kronecker = self._kronecker(site, seen.rounding_gram, seen.inputs)
        return {
            PAPER: rms,
            "jacobian-rms": rms,
            "jacobian-rms-rss": rms,
            "kronecker": kronecker,
            "kronecker-rss": kronecker,
        }

    def _kronecker(self, site: str, gram: Tensor | None, inputs: int) -> float:
        """Root of the expected squared change, rows of errors and gradients independent."""
        if gram is None or site not in self.gains.slopes:
            return 0.0
        total = float((gram * self.gains.slopes[site]).sum()) / max(1, inputs)
        return math.sqrt(max(0.0, total) / self.gains.rows[site])

    def _measured(self, site: str, fmt: Format, other: Format | None) -> float | None:
        """Drift with only this layer changed; the same formats as the reference's: none."""
        if self._damage is None:
            return None
        if fmt == other:
            return 0.0
        return math.sqrt(self._damage.get(site, {}).get(fmt, 0.0)) * self._size

    def _residual(self, site: str, fmt: Format, other: Format | None) -> float:
        key = site, fmt, other
        if key not in self._norms:
            layer = self.elastic.layers[site]
            change = self.change(site, fmt, other)
            self._norms[key] = 0.0 if fmt == other else operator_norm(layer.site, change)
        return self._norms[key]

    def change(self, site: str, fmt: Format, other: Format | None) -> Tensor:
        """The weight residual dW."""
        for one in (fmt, other):
            if (site, one) not in self._weights:
                self._weights[site, one] = effective(self.elastic.layers[site], one).detach()
        return self._weights[site, fmt] - self._weights[site, other]

    def _observe(
        self,
        formats: Mapping[str, Format],
        reference: Mapping[str, Format] | None,
        activations: bool,
    ) -> dict[str, _Seen]:
        """Run the compressed model; compare every layer with its reference on its own input."""
        self._weights = {k: v for k, v in self._weights.items() if formats.get(k[0]) == k[1]}
        seen = {name: _Seen() for name in self.elastic.sites}
        for batch in self.batches:
            before = {name: s.x for name, s in seen.items()}
            watch = _Watch(self, formats, reference, activations, seen)
            with torch.no_grad(), self.elastic.using(formats if activations else None):
                result = watch.run(*batch)
            count = samples_in(batch, float_outputs(result))
            for name, s in seen.items():
                s.inputs += count
                s.alphas = (*s.alphas, _rms(s.x - before[name], count))
        return seen

    def _output_norm(self) -> float:
        """RMS over inputs of the norm of the original outputs."""
        total, inputs = 0.0, 0
        with torch.no_grad(), self.elastic.using(None):
            for batch in self.batches:
                outputs = float_outputs(self.elastic.graph(*batch))
                total += sum(float(y.double().square().sum()) for y in outputs)
                inputs += samples_in(batch, outputs)
        return _rms(total, inputs)


class _Watch(fx.Interpreter):
    """Runs the compressed model and adds up what each layer does differently."""

    def __init__(
        self,
        meter: Meter,
        formats: Mapping[str, Format],
        reference: Mapping[str, Format] | None,
        activations: bool,
        seen: Mapping[str, _Seen],
    ) -> None:
        super().__init__(meter.elastic.graph)
        self.meter, self.formats, self.reference = meter, formats, reference
        self.activations, self.seen = activations, seen

    def run_node(self, n: fx.Node) -> Any:
        """Run the node; look closer if it is a site."""
        layer = self.meter.calls.get(n)
        if layer is None:
            return super().run_node(n)
        name = layer.site.name
        fmt, other = self.formats[name], _at(self.reference, name)
        x: Tensor = self.env[n.all_input_nodes[0]]
        exact = super().run_node(n)
        smooth = apply(layer.site, self.meter.change(name, fmt, None), x)
        smooth = smooth + apply(layer.site, layer.weight, x, layer.bias)
        change = apply(layer.site, self.meter.change(name, fmt, other), x)
        rounding = None
        if self.activations and fmt != other:
            rounding = exact - smooth if fmt.bits < 32 else None
            if other is not None and other.bits < 32:
                rest = self._exact(layer, other, x) - (smooth - change)
                rounding = -rest if rounding is None else rounding - rest
        _add(self.seen[name], layer, x, change, rounding)
        return exact if self.activations else smooth

    def _exact(self, layer: ElasticLayer, fmt: Format, x: Tensor) -> Tensor:
        """The layer in another format, on integers."""
        before = layer.state
        layer.state = fmt, True
        try:
            found: Tensor = layer(x)
            return found
        finally:
            layer.state = before


def _add(seen: _Seen, layer: ElasticLayer, x: Tensor, change: Tensor, off: Tensor | None) -> None:
    seen.x += float(x.double().square().sum())
    seen.weight += float(change.double().square().sum())
    seen.weight_gram = _gram(seen.weight_gram, layer, change)
    if off is not None:
        seen.rounding += float(off.double().square().sum())
        seen.rounding_gram = _gram(seen.rounding_gram, layer, off)


def _gram(total: Tensor | None, layer: ElasticLayer, value: Tensor) -> Tensor:
    rows = rows_of(layer, value)
    gram = rows.T @ rows
    return gram if total is None else total + gram


def _at(formats: Mapping[str, Format] | None, site: str) -> Format | None:
    return None if formats is None else formats[site]


def _rms(total: float, inputs: int) -> float:
    return math.sqrt(total / inputs) if inputs else 0.0


def _combined(variant: str, parts: Sequence[float]) -> float:
    if variant in SQUARED:
        return math.sqrt(math.fsum(part**2 for part in parts))
    return math.fsum(parts)


def _spread(alphas: Sequence[float]) -> float:
    """(Most - least) / mean over disjoint draws of the batches."""
    draws = [alphas[i::DRAWS] for i in range(min(DRAWS, len(alphas)))]
    means = [math.sqrt(math.fsum(a**2 for a in d) / len(d)) for d in draws]
    middle = math.fsum(means) / len(means) if means else 0.0
    return (max(means) - min(means)) / middle if middle > 0 else 0.0


def proxies(meter: Meter, chain: ProfileChain, progress: Any = None) -> dict[str, Proxy]:
    """The proxy of every profile, non-increasing along the chain by raising smaller ones.

    Args:
        meter: Of the model.
        chain: Its profiles.
        progress: Called with (what, done, total).
    """
    most = chain.profiles[-1].formats
    found: dict[str, Proxy] = {}
    reached: dict[str, float] = {}
    for done, profile in enumerate(reversed(chain.profiles)):
        if progress is not None:
            progress("estimating drift", done, len(chain))
        start = time.monotonic()
        whole = meter.against(profile.formats)
        teacher = meter.against(profile.formats, most)
        estimates = {}
        for name, (raw, without) in whole.totals.items():
            reached[name] = max(reached.get(name, 0.0), raw)
            estimates[name] = Estimate(reached[name], raw, teacher.totals[name][0], raw - without)
        found[profile.name] = Proxy(
            estimates,
            whole.shares,
            whole.spread,
            whole.inputs,
            len(meter.gains.measured),
            meter.gains.seconds + time.monotonic() - start,
        )
    if progress is not None:
        progress("estimating drift", len(chain), len(chain))
    return {profile.name: found[profile.name] for profile in chain}


def with_proxies(chain: ProfileChain, found: Mapping[str, Proxy]) -> ProfileChain:
    """The chain with `certificate.proxy` of every profile."""
    return ProfileChain(
        tuple(replace(p, certificate=replace(p.certificate, proxy=found[p.name])) for p in chain)
    )
