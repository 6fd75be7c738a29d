"""What elastic linear layers and convolutions share: state, factors, integer codes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from t3c.core.codes import Correction, Grouped, Matrix, Nested, SiteCodes
from t3c.core.errors import T3CError
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.grid import Grid
from t3c.core.registry import resolve
from t3c.core.sites import LinearSite, Site
from t3c.elastic import fake_quant
from t3c.elastic.factorize import DEFAULT, FACTORIZATIONS, LOW_RANK
from t3c.elastic.factorize.base import AbstractFactorizer

INPUT = "x"
"""Name of the grid of a layer's input."""
State = tuple[Format | None, bool]

_NAMES = {
    LowRank: ("low", "high"),
    Tucker2: ("reduce", "core", "expand"),
    CP: ("cp_in", "cp_tall", "cp_wide", "cp_out"),
}
FLOAT_FACTORS = frozenset({"cp_tall", "cp_wide"})
"""Factors that stay float32 in every format: depthwise over one axis, too small to matter."""


class ElasticLayer(nn.Module, ABC):
    """One site: its dense weight, its factors (made on first use), and the format it runs in.

    Attributes:
        site: What and where it is.
        format: Format of the next calls; None is the original dense float layer.
        exact: Whether formats below 32 bits run on integers as the kernels do; else in float.
        grids: Fixed grids of activations: of the input (`INPUT`) and of the outputs of inner
            steps, by factor. Where there is none, activations get their scale from each call.
        thin: Name of the factorizer that makes low ranks.
        correction: Gain and bias of the outputs in the choice of formats in force, or None.
    """

    def __init__(self, site: Site, weight: Tensor, bias: Tensor | None) -> None:
        """Take over weight and bias (as parameters; storage is shared)."""
        super().__init__()
        self.site = site
        self.format: Format | None = None
        self.exact = True
        self.thin = DEFAULT
        self.grids: dict[str, Grid] = {}
        self.correction: Correction | None = None
        self.weight = nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        for names in _NAMES.values():
            for name in names:
                self.register_parameter(name, None)
        self._moment: Tensor | None = None
        self._rounded: dict[tuple[str, int], Matrix | Grouped] = {}
        self._cache: dict[tuple[str, int], tuple[tuple[int, int], fake_quant.Codes]] = {}

    @property
    def state(self) -> State:
        """(format, exact), to be restored later."""
        return self.format, self.exact

    @state.setter
    def state(self, value: State) -> None:
        self.format, self.exact = value

    def check(self, fmt: Format) -> None:
        """Refuse a format that this site cannot run.

        Raises:
            ValueError: The kind or the width does not fit the layer, or a rank is above the full
                one.
        """
        self.site.elements(fmt)  # refuses convolution formats for linear sites and the reverse
        if fmt.bits == 4 and not isinstance(self.site, LinearSite):
            raise ValueError(
                f"site {self.site.name!r} is a convolution; {fmt} has 4 bits, allowed are 8 and 32"
            )
        most = self.most(fmt)
        over = [(r, m) for r, m in zip(fmt.ranks, most, strict=True) if r > m]
        if over and not isinstance(fmt, Dense):
            raise ValueError(
                f"site {self.site.name!r}: {fmt} has rank {over[0][0]}, the largest is {over[0][1]}"
            )

    def held(self) -> Iterator[object]:
        """Weights, factors, moment and codes: what a twin of the layer shares with it."""
        yield from self.parameters()
        yield from (self._moment, *self._rounded.values())
        yield from (tensor for _, codes in self._cache.values() for tensor in codes)

    @abstractmethod
    def most(self, fmt: Format) -> tuple[int, int]:
        """The largest ranks of a format's kind."""

    @abstractmethod
    def _smooth(self, x: Tensor, fmt: Format | None) -> Tensor:
        """The layer in float, factors cut to the format's ranks."""

    @abstractmethod
    def _integer(self, x: Tensor, fmt: Format) -> Tensor:
        """The layer on integers, as the kernels compute it."""

    @abstractmethod
    def factorizer(self, kind: type[Format]) -> str:
        """Name of the factorizer that makes the factors of a format kind."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer in its current format; gradients pass straight through the integers."""
        fmt = self.format
        if fmt is None or not self.exact or fmt.bits == 32:
            return self._smooth(x, fmt)
        y = self._integer(x, fmt)
        trained = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        return fake_quant.straight_through(y, self._smooth(x, fmt)) if trained else y

    def factor(self, name: str) -> Tensor:
        """A factor at its largest rank, made now if it is not there yet."""
        value = getattr(self, name)
        if value is None:
            kind = next(k for k, names in _NAMES.items() if name in names)
            self.factorize(kind)
            value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise T3CError(f"site {self.site.name!r} has no factor {name!r}")
        return value

    def reach(self, name: str, full: int, axis: int = 0) -> int:
        """Components that a factor has along an axis; `full` while there is no such factor."""
        value = getattr(self, name)
        return int(value.shape[axis]) if isinstance(value, Tensor) else full

    def factorize(self, kind: type[Format]) -> None:
        """Make the factors of a format kind from the weight and the input moment, if known."""
        found = resolve(FACTORIZATIONS, self.factorizer(kind), "factorization", T3CError)
        if not isinstance(found, AbstractFactorizer):
            raise T3CError(f"{found!r} is no factorizer")
        with torch.inference_mode(False):  # first use may lie inside it; parameters must not
            weight = self.weight.clone() if self.weight.is_inference() else self.weight
            self.set_factors(found.split(weight, self._moment, ranks=self.fit_ranks(kind)))

    def fit_ranks(self, kind: type[Format]) -> tuple[int, ...] | None:
        """Ranks that factors of a kind are fitted to where nobody names any; None: all."""
        return None

    def set_thin(self, name: str) -> None:
        """Make low ranks by this factorizer; factors are made again on next use.

        Raises:
            ValueError: It is none that makes low ranks.
        """
        if name not in LOW_RANK:
            raise ValueError(
                f"factorizer is {name!r}; allowed are {', '.join(map(repr, LOW_RANK))}"
            )
        self.thin = name
        self.set_moment(self._moment)

    def set_moment(self, moment: Tensor | None) -> None:
        """Give the inputs' second moment [k, k]; factors are made again on next use."""
        self._moment = moment
        for names in _NAMES.values():
            for name in names:
                setattr(self, name, None)
                self._forget(name)

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Use these factors from now on.

        Raises:
            ValueError: A name is unknown, a shape does not fit, or values are not finite.
        """
        shapes = self._shapes()
        for name, value in factors.items():
            if name not in shapes:
                raise ValueError(
                    f"site {self.site.name!r}: no factor {name!r}; allowed are {', '.join(shapes)}"
                )
            want = shapes[name]
            fits = len(want) == value.dim() and all(
                w is None or w == s for w, s in zip(want, value.shape, strict=True)
            )
            if not fits:
                raise ValueError(
                    f"site {self.site.name!r}: {name} is {tuple(value.shape)}, needs "
                    f"{tuple('rank' if w is None else w for w in want)}"
                )
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"site {self.site.name!r}: {name} holds NaN or infinity; check the calibration "
                    "data and what made the factors"
                )
        for name, value in factors.items():
            value = value.clone() if value.is_inference() else value
            setattr(self, name, nn.Parameter(value.detach().to(self.weight.device).float()))
            self._forget(name)

    @abstractmethod
    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Shape of every factor; None is a rank."""

    def _forget(self, name: str) -> None:
        """Drop given codes of a factor that changes."""
        for bits in (8, 4):
            self._rounded.pop((name, bits), None)

    def set_codes(self, name: str, codes: Matrix | Grouped) -> None:
        """Use these codes for a factor or for ``weight`` in place of plain rounding.

        Args:
            name: The factor.
            codes: Of 8 bits, or `Grouped` of 4; those of the other width stay as they are.

        Raises:
            ValueError: The shape does not fit.
        """
        value = self.weight if name == "weight" else self.factor(name)
        if codes.q.shape != tuple(value.shape):
            raise ValueError(
                f"site {self.site.name!r}: codes of {name} are {codes.q.shape}, need "
                f"{tuple(value.shape)}"
            )
        self._rounded[name, 4 if isinstance(codes, Grouped) else 8] = codes
        if name == "weight" and isinstance(self._rounded.get(("weight", 8)), Grouped):
            del self._rounded["weight", 8]  # nested in the 4-bit codes that were there before

    def set_nested(self, codes: Nested) -> None:
        """Use these codes for ``weight`` in 8 and in 4 bits: one array serves both.

        Raises:
            ValueError: The shape does not fit.
        """
        self.set_codes("weight", codes.coarse)
        self._rounded["weight", 8] = codes.whole

    def codes_of(self, name: str, bits: int = 8) -> fake_quant.Codes:
        """Codes and scales of a factor or of ``weight``, at the largest rank.

        Rounded per output row over all components (8 bits) or in groups of 64 (4 bits), so that a
        smaller rank only slices.
        """
        value = self.weight if name == "weight" else self.factor(name)
        stamp = (value.data_ptr(), value._version)
        cached = self._cache.get((name, bits))
        given = self._rounded.get((name, bits))
        if cached is not None and cached[0] == stamp and given is None:
            return cached[1]
        if given is not None:
            q = torch.from_numpy(given.q).to(value.device)
            codes = (q, torch.from_numpy(given.scale).to(value.device))
        elif bits == 4:
            codes = fake_quant.quantize_groups(value)
        else:
            codes = fake_quant.quantize_weight(value)
        self._cache[name, bits] = (stamp, codes)
        return codes

    def codes(self, formats: Iterable[Format] | None = None) -> SiteCodes:
        """Integer weights for lowering.

        Args:
            formats: The formats that profiles use here; factors are cut to the largest rank used
                and left out where no format needs them. None: the dense weight alone.
        """
        used = [Dense()] if formats is None else list(formats)
        for fmt in used:
            self.check(fmt)
        found: dict[str, Any] = {}
        if any(isinstance(f, Dense) and f.bits != 4 for f in used):
            found |= self._dense()
        if Dense(4) in used:
            found["dense4"] = self._groups("weight", None, None)
        if thin := [f.rank for f in used if isinstance(f, LowRank) and f.bits == 4]:
            found["low4"] = self._groups("low", max(thin), None)
            found["high4"] = self._groups("high", None, max(thin))
        for kind, cut in (
            (LowRank, {"low": (1, 0), "high": (0, 1)}),
            (Tucker2, {"reduce": (1, 0), "core": (2, 1), "expand": (0, 2)}),
            (CP, {"cp_in": (1, 0), "cp_tall": (1, 0), "cp_wide": (1, 0), "cp_out": (0, 1)}),
        ):
            mine = [f for f in used if isinstance(f, kind) and f.bits != 4]
            if not mine:
                continue
            most = (None, *(int(max(f.ranks[i] for f in mine)) for i in (0, 1)))
            for name, (rows, cols) in cut.items():
                if name in FLOAT_FACTORS:
                    found[name] = self.factor(name).detach().cpu().numpy()[: most[rows]].copy()
                else:
                    found[name] = self._matrix(name, most[rows], most[cols])
        bias = np.zeros(self.weight.shape[0], np.float32)
        if self.bias is not None:
            bias = self.bias.detach().cpu().numpy().astype(np.float32).copy()
        return SiteCodes(bias=bias, grids=dict(self.grids), **found)

    def _dense(self) -> dict[str, Matrix | Nested]:
        whole = self._rounded.get(("weight", 8))
        coarse = self._rounded.get(("weight", 4))
        if isinstance(whole, Grouped) and isinstance(coarse, Grouped):
            return {"nested": Nested.of(whole, coarse)}
        return {"dense": self._matrix("weight", None, None)}

    def _matrix(self, name: str, rows: int | None, cols: int | None) -> Matrix:
        q, scale = self.codes_of(name)
        full = Matrix(q.cpu().numpy(), scale.cpu().numpy()).prefix(rows, cols)
        return Matrix(np.ascontiguousarray(full.q), np.ascontiguousarray(full.scale))

    def _groups(self, name: str, rows: int | None, cols: int | None) -> Grouped:
        q, scale = self.codes_of(name, 4)
        full = Grouped(q.cpu().numpy(), scale.cpu().numpy()).prefix(rows, cols)
        return Grouped(np.ascontiguousarray(full.q), np.ascontiguousarray(full.scale))
