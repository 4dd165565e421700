"""Instruments on an attention matrix: pure functions of P, float64, over any leading dimensions.

P is (..., N, N), row i the weights that query i gives to the keys. What needs a distribution works on rows
scaled to sum to one (AdaMRA's gate, Routing's unassigned queries: see `normalise_rows`); rows of zeros are
left out of averages. Where a measure is not defined (negative weights, one token), it is NaN, never zero.

Sources: the LLN paper (arXiv 2311.13541) for entropy, spectral gap, temperature and log-normality; the LRA
paper (arXiv 2011.04006, §2.3) for the required attention span; the MRA paper for the error against softmax.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, eigs
from torch import Tensor

ROUNDING = 1e-12
"""Weights above -ROUNDING count as zero, not as negative."""

DENSE_EIGENVALUES = 384
"""Longest N whose eigenvalues are all computed; beyond, Arnoldi iteration finds the largest ones."""


def row_sums(matrix: Tensor) -> Tensor:
    """Σ_j P_ij of every row, (..., N); 1 for a convex combination of the values."""
    return matrix.sum(-1)


def negative_share(matrix: Tensor) -> Tensor:
    """Share of the total absolute weight that is negative, in [0, 1]; above zero no row is a distribution."""
    return matrix.clamp(max=0).abs().sum((-2, -1)) / matrix.abs().sum((-2, -1))


def normalise_rows(matrix: Tensor) -> Tensor:
    """Rows scaled to sum to one; rows of zeros stay zero. NaN where P has negative weights."""
    negative = matrix.amin((-2, -1), keepdim=True) < -ROUNDING
    positive = matrix.clamp(min=0)
    total = positive.sum(-1, keepdim=True)
    return (positive / total.masked_fill(total == 0, 1.0)).masked_fill(negative, math.nan)


def _mean_over_rows(per_row: Tensor, matrix: Tensor) -> Tensor:
    """Mean of (..., N) over the rows of P that attend to anything; NaN where none does."""
    attends = matrix.abs().sum(-1) > 0
    return per_row.masked_fill(~attends, 0.0).sum(-1) / attends.sum(-1)


def entropy(matrix: Tensor) -> Tensor:
    """Mean entropy of a row in bits: H = -(1/N) Σ_i Σ_j P_ij log2 P_ij, between 0 and log2 N."""
    rows = normalise_rows(matrix)
    return _mean_over_rows(torch.special.entr(rows).sum(-1) / math.log(2), rows)


def normalised_entropy(matrix: Tensor) -> Tensor:
    """Entropy over its maximum, H / log2 N, in [0, 1]; NaN for one token."""
    length = matrix.shape[-1]
    return entropy(matrix) / (math.log2(length) if length > 1 else math.nan)


def spectral_gap(matrix: Tensor) -> Tensor:
    """γ = 1 - |λ2|, λ2 the second largest eigenvalue of row-normalised P by modulus; NaN for one token.

    Near 1 where every query attends to the same keys (P close to rank one, concentration is biased), near 0
    where queries have their own (P close to a permutation). Read beside the entropy, which cannot tell these.
    """
    return 1 - _for_each(_second_modulus, normalise_rows(matrix))


def low_rank_gap(left: Tensor, right: Tensor) -> Tensor:
    """Spectral gap of P = left rightᵀ from the D×D matrix rightᵀ left: O(N D² + D³) instead of O(N³).

    left, right   (..., N, D); for LLN left = softmax_l(α q + λ) and right = softmax_j(β k). The non-zero
                  eigenvalues of both products are the same. P is taken as it is, without row normalisation.
    """
    return 1 - _for_each(_second_modulus, right.mT @ left)


def _second_modulus(matrix: Tensor) -> float:
    length = matrix.shape[-1]
    if length < 2 or not bool(matrix.isfinite().all()):
        return math.nan
    values = matrix.cpu().numpy()
    if length > DENSE_EIGENVALUES:
        try:
            start = np.random.default_rng(0).random(length)  # a fixed start makes the iteration repeatable
            largest = eigs(values, k=4, ncv=64, v0=start, return_eigenvectors=False)
            return float(np.sort(np.abs(largest))[-2])
        except ArpackError:  # no convergence: many eigenvalues of one modulus, as a permutation has
            pass
    # NumPy's LAPACK, since the one in PyTorch's CPU build (MKL) does not converge on the uniform 64 x 64 matrix.
    return float(np.sort(np.abs(np.linalg.eigvals(values)))[-2])


def temperature(matrix: Tensor) -> Tensor:
    """τ = 1 / std(ln P_ij) over the positive weights; infinite for uniform attention."""
    return log_normality(matrix).variance.rsqrt()


def softmax_temperature(query: Tensor, key: Tensor) -> Tensor:
    """τ = 1 / std(a_ij) of the logits a = q kᵀ / √D, (..., N, D) each; 1 / (σ_q σ_k) for independent Gaussians."""
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    return 1 / logits.flatten(-2).std(-1)


class LogNormality(NamedTuple):
    """Moments of ln P_ij over the positive weights of P, and its distance from a normal distribution."""

    mean: Tensor
    variance: Tensor
    skewness: Tensor
    excess_kurtosis: Tensor
    distance: Tensor
    """Kolmogorov-Smirnov distance to the normal of this mean and variance, in [0, 1]; 0 = log-normal weights."""


def log_normality(matrix: Tensor) -> LogNormality:
    """Moments of ln P_ij and the Kolmogorov-Smirnov distance max |F(ln P) - Φ|, one of each a matrix.

    For softmax on Gaussian q, k: mean ≈ -ln N - var/2, variance ≈ σ_q² σ_k², distance ≈ 0 (LLN paper).
    """
    return LogNormality(*_for_each(_log_moments, normalise_rows(matrix)).unbind(-1))


def _log_moments(matrix: Tensor) -> tuple[float, ...]:
    values = matrix[matrix > 0].log().sort().values
    if values.numel() < 2:
        return (math.nan,) * 5
    mean, variance = values.mean(), values.var(correction=0)
    if variance <= (1e-9 * mean) ** 2:  # uniform weights: nothing but rounding to look at
        return float(mean), 0.0, math.nan, math.nan, math.nan
    standard = (values - mean) * variance.rsqrt()
    normal = torch.special.ndtr(standard)
    steps = torch.arange(values.numel() + 1, dtype=values.dtype, device=values.device) / values.numel()
    distance = torch.maximum(steps[1:] - normal, normal - steps[:-1]).max()
    return float(mean), float(variance), float((standard**3).mean()), float((standard**4).mean() - 3), float(distance)


def column_bias(matrix: Tensor) -> Tensor:
    """Spread of the columns: N · std_j( (1/N) Σ_i P_ij ); 0 = unbiased, √(N - 1) = all weight on one key."""
    return normalise_rows(matrix).mean(-2).std(-1, correction=0) * matrix.shape[-1]


def required_span(matrix: Tensor, positions: Tensor | None = None) -> Tensor:
    """Required attention span: the mean distance |i - j| of query and key, weighted by P (LRA paper, §2.3).

    positions   (N,) place of each token in the sequence, where P holds only some of them; None = 0 .. N - 1
    """
    if positions is None:
        positions = torch.arange(matrix.shape[-1], device=matrix.device)
    distance = (positions[:, None] - positions[None, :]).abs().to(matrix.dtype)
    rows = normalise_rows(matrix)
    return _mean_over_rows((rows * distance).sum(-1), rows)


def relative_error(output: Tensor, reference: Tensor) -> Tensor:
    """‖output - reference‖ / ‖reference‖ over the last two dimensions (Frobenius), one a matrix."""
    return torch.linalg.matrix_norm(output - reference) / torch.linalg.matrix_norm(reference)


def _for_each(function: Callable[[Tensor], float | tuple[float, ...]], matrices: Tensor) -> Tensor:
    """The numbers that `function` gives for every matrix of (..., N, N), as (...) or (..., how many numbers)."""
    values = [function(one) for one in matrices.reshape(-1, *matrices.shape[-2:])]
    table = torch.tensor(values, dtype=matrices.dtype, device=matrices.device)
    return table.reshape(matrices.shape[:-2] + table.shape[1:])
