"""Upper bounds of operator norms and of norms over forms: proven, never by power iteration."""

import math

import torch
from torch import Tensor

from t3c.certificate.sound.form import Form

SLACK = 1 + 1e-9
"""For the rounding of float64 factorizations."""
FULL = 1024
"""Largest side of a matrix that is factorized whole."""
FOURIER = 40_000_000
"""Most numbers of the transfer matrices of a convolution."""


def matrix_norm(w: Tensor) -> float:
    """Largest singular value, or a bound of it where the matrix is large.

    Source: exact by factorization; else the smaller of the Frobenius norm and Schur's
    sqrt(||W||_1 ||W||_inf).
    """
    w = w.double()
    if not w.numel():
        return 0.0
    if min(w.shape) <= FULL:
        gram = w @ w.t() if w.shape[0] <= w.shape[1] else w.t() @ w
        top = float(torch.linalg.eigvalsh(gram)[-1])
        # eigenvalues of the rounded product are within n u ||W||_F^2 of the true ones
        return math.sqrt(max(0.0, top + 1e-11 * float(w.square().sum()))) * SLACK
    schur = math.sqrt(float(w.abs().sum(0).max()) * float(w.abs().sum(1).max()))
    return min(float(w.norm()), schur) * SLACK


def conv_norm(
    w: Tensor, size: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> float:
    """A bound for a zero-padded convolution of w [out, in, kh, kw] on images of one size.

    A stride only drops outputs. The smallest of: the sum over taps of their matrices' norms;
    Schur's bound; and the largest norm of a transfer matrix on the torus in which the image with
    its padding fits, of whose circular convolution this one is a part.
    Source: Sedghi, Gupta, Long, The singular values of convolutional layers (arXiv 1805.10408).
    """
    w = w.double()
    kh, kw = w.shape[2:]
    taps = sum(matrix_norm(w[:, :, i, j]) for i in range(kh) for j in range(kw))
    mass = w.abs().sum((2, 3))
    schur = math.sqrt(float(mass.sum(0).max()) * float(mass.sum(1).max()))
    torus = [
        n + 2 * p + d * (k - 1)
        for n, p, d, k in zip(size, padding, dilation, (kh, kw), strict=True)
    ]
    found = min(taps, schur * SLACK)
    if kh * kw == 1 or w.shape[0] * w.shape[1] * torus[0] * torus[1] > FOURIER:
        return found
    spread = w.new_zeros(*w.shape[:2], *torus)
    spread[:, :, : dilation[0] * kh : dilation[0], : dilation[1] * kw : dilation[1]] = w
    transfer = torch.fft.rfft2(spread).permute(2, 3, 0, 1)
    top = float(torch.linalg.matrix_norm(transfer, 2).max())
    return min(found, top * SLACK + 1e-11 * float(w.abs().sum()))


def largest_norm(form: Form, steps: int = 120) -> float:
    """A bound of the L2 norm over a form with few elements.

    For symbols in [-1, 1] and any positive d: ||G eps||^2 <= lambda_max(G D^-1 G^T) sum(d), the
    dual of a semidefinite program, within sqrt(pi / 2) of the truth at its best d. Symbols of
    one ball share one d. Source: Nesterov, Semidefinite relaxation and nonconvex quadratic
    optimization (1998).
    """
    by_element = float(form.peak.norm())
    if form.space.mode != "symbols" or form.c.numel() > 512:
        return min(by_element, form.norm)
    first = min(form.space.ball, len(form.g))  # a form without values has no ball either
    g = torch.cat([form.g.flatten(1), form.h.flatten(1), form.c.flatten()[None]])
    owner = torch.cat([torch.zeros(first, dtype=torch.long), 1 + torch.arange(len(g) - first)])
    kept = g.norm(dim=1) > 0
    g, owner = g[kept], owner[kept]
    rest = min(form.r, float(form.e.norm()))
    if not len(g):
        return min(by_element, rest)
    whole = _dual(g, owner, steps) * SLACK + rest
    return min(by_element, whole, form.norm)


def _dual(g: Tensor, owner: Tensor, steps: int) -> float:
    """The smallest sqrt(lambda_max sum d) that a short descent finds; every step is a bound."""
    _, owner = torch.unique(owner, return_inverse=True)
    count = int(owner.max()) + 1
    start = torch.zeros(count, dtype=g.dtype).scatter_reduce(0, owner, g.norm(dim=1), "amax")
    log_d = start.clamp_min(1e-300).log().requires_grad_()
    best = math.inf
    adam = torch.optim.Adam([log_d], lr=0.05)
    with torch.enable_grad():
        for _ in range(steps):
            d = log_d.exp()
            gram = (g / d[owner][:, None]).t() @ g
            value = torch.linalg.eigvalsh(gram)[-1] * d.sum()
            bound = math.sqrt(max(0.0, float(value.detach())))
            best = min(best, bound if math.isfinite(bound) else math.inf)
            adam.zero_grad()
            value.log().backward()
            adam.step()
    return best
