"""Moment matching: how sharp the exponential feature maps are, from the spread of queries and keys.

    s = √((σq² σk² − b) / 2a),   α = s / σq,   β = s / σk

makes var(ln P) of LLN attention, about a·V + b with V = α²σq² + β²σk² split evenly between queries and keys,
equal to that of softmax attention, σq² σk². Source: arXiv 2311.13541 and the authors' `lln_attention.py`.
"""

import math

import torch
from torch import Tensor

from kernels.common.inputs import check_choice
from kernels.common.layout import compute_dtype

CONSTANTS = ("published", "head_dim")

PUBLISHED = (0.14855178144710912, -0.35487039130661086)
"""(a, b) of the authors' code, which belong to a head dimension of 64."""

FITTED = {
    8: (0.3329, -0.3532),
    16: (0.2528, -0.3809),
    32: (0.1898, -0.3702),
    48: (0.1648, -0.3633),
    64: PUBLISHED,
    96: (0.1238, -0.3251),
    128: (0.1114, -0.3098),
}
"""(a, b) per head dimension D: var(ln Σ_{l≤D} exp x_l), x ~ N(0, V) iid, regressed on 5.25 ≤ V ≤ 7."""

SMALLEST_SPREAD = 1e-4
"""σ is not taken below this: equal tokens have σ = 0, for which α and β do not exist."""


def moment_constants(constants: str, head_dim: int) -> tuple[float, float]:
    """The pair (a, b): the authors', or the one fitted to the head dimension.

    Between the fitted dimensions both are linear in log D. ValueError for an unknown name, and for a dimension
    outside the fit, where (a, b) would be a guess.
    """
    check_choice(CONSTANTS, constants=constants)
    if constants == "published":
        return PUBLISHED
    if not min(FITTED) <= head_dim <= max(FITTED):
        raise ValueError(
            f"attention.constants=head_dim is fitted for {min(FITTED)} <= head_dim <= {max(FITTED)}, "
            f"got head_dim={head_dim}; use attention.constants=published"
        )
    below = max(dim for dim in FITTED if dim <= head_dim)
    above = min(dim for dim in FITTED if dim >= head_dim)
    part = 0.0 if below == above else math.log(head_dim / below) / math.log(above / below)
    (a0, b0), (a1, b1) = FITTED[below], FITTED[above]
    return a0 + part * (a1 - a0), b0 + part * (b1 - b0)


@torch.no_grad()
def spread(x: Tensor, real: Tensor) -> Tensor:
    """σ of a call: the unbiased standard deviation over all entries of real tokens, without gradient.

    x       (B, H, N, D)
    real    (B, N) bool
    return  scalar, at least SMALLEST_SPREAD; 1 where fewer than two entries are real
    """
    x = x.to(compute_dtype(x.dtype))
    padded = ~real[:, None, :, None]
    count = real.sum() * (x.shape[1] * x.shape[3])
    mean = x.masked_fill(padded, 0.0).sum() / count.clamp(min=1)
    squares = (x - mean).masked_fill(padded, 0.0).square().sum()
    sigma = (squares / (count - 1).clamp(min=1)).sqrt().clamp(min=SMALLEST_SPREAD)
    return torch.where(count > 1, sigma, 1.0)


@torch.no_grad()
def match_moments(sigma_query: Tensor, sigma_key: Tensor, constants: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """α and β from the spreads, of their (broadcast) shape."""
    a, b = constants
    s = ((sigma_query.square() * sigma_key.square() - b) / (2 * a)).sqrt()
    return s / sigma_query, s / sigma_key
