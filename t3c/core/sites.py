"""A site is one elastic layer of the user's model: its place, its shape, its formats' costs."""

from dataclasses import dataclass

from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2


@dataclass(frozen=True, slots=True)
class LinearSite:
    """y[rows, n] = x[rows, k] W[n, k]^T + b[n].

    Attributes:
        name: The user's module path, for example ``encoder.layer.0.attention.self.query``.
        n: Output features.
        k: Input features.
        rows: Rows of x at the example inputs (batch times positions), summed over calls.
        bias: Whether a bias is added.
    """

    name: str
    n: int
    k: int
    rows: int
    bias: bool

    @property
    def full_rank(self) -> int:
        """min(n, k)."""
        return min(self.n, self.k)

    def elements(self, fmt: Format) -> int:
        """Weight elements that the format stores, without bias and scales."""
        match fmt:
            case Dense():
                return self.n * self.k
            case LowRank():
                return fmt.rank * (self.n + self.k)
            case _:
                raise ValueError(f"site {self.name!r} is linear; {fmt} is a convolution format")

    def macs(self, fmt: Format) -> int:
        """Multiply-adds of one inference at the example inputs."""
        return self.rows * self.elements(fmt)


@dataclass(frozen=True, slots=True)
class ConvSite:
    """A 2-D convolution with groups = 1 (1-D is 2-D with height 1), NCHW.

    Attributes:
        name: The user's module path.
        out_channels: Output channels.
        in_channels: Input channels.
        kernel: (height, width) of the window.
        stride: (height, width).
        padding: (height, width), the same on both sides, zeros.
        dilation: (height, width).
        batch: Images at the example inputs, summed over calls.
        in_size: (height, width) of the input.
        out_size: (height, width) of the output.
        bias: Whether a bias is added.
        normalized: Whether a batch norm was folded into it.
    """

    name: str
    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    batch: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    bias: bool
    normalized: bool = False

    @property
    def full_rank(self) -> int:
        """min(out_channels, in_channels)."""
        return min(self.out_channels, self.in_channels)

    @property
    def pointwise(self) -> bool:
        """Whether the window is 1x1, so that the layer is a linear map per pixel."""
        return self.kernel == (1, 1)

    def elements(self, fmt: Format) -> int:
        """Weight elements that the format stores, without bias and scales."""
        taps = self.kernel[0] * self.kernel[1]
        match fmt:
            case Dense():
                return self.out_channels * self.in_channels * taps
            case LowRank() if self.pointwise:
                return fmt.rank * (self.in_channels + self.out_channels)
            case LowRank():
                raise ValueError(
                    f"site {self.name!r} has a {self.kernel} window; lowrank needs 1x1"
                )
            case Tucker2():
                reduce = self.in_channels * fmt.rank_in
                return reduce + fmt.rank_in * fmt.rank_out * taps + fmt.rank_out * self.out_channels
            case CP():
                return fmt.rank * (self.in_channels + sum(self.kernel) + self.out_channels)

    def macs(self, fmt: Format) -> int:
        """Multiply-adds of one inference at the example inputs."""
        pixels_in = self.batch * self.in_size[0] * self.in_size[1]
        pixels_out = self.batch * self.out_size[0] * self.out_size[1]
        taps = self.kernel[0] * self.kernel[1]
        match fmt:
            case Dense():
                return pixels_out * self.elements(fmt)
            case LowRank():
                return pixels_out * self.elements(fmt)
            case Tucker2():
                reduce = pixels_in * self.in_channels * fmt.rank_in
                core = pixels_out * fmt.rank_in * fmt.rank_out * taps
                return reduce + core + pixels_out * fmt.rank_out * self.out_channels
            case CP():
                tall = self.batch * self.out_size[0] * self.in_size[1]
                reduce = pixels_in * self.in_channels * fmt.rank
                depth = fmt.rank * (tall * self.kernel[0] + pixels_out * self.kernel[1])
                return reduce + depth + pixels_out * fmt.rank * self.out_channels


Site = LinearSite | ConvSite
