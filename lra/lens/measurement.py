"""All instruments on one call of one attention: a row of `lens.csv`."""

import math

import torch
from torch import Tensor

import attention
from attention import Attention
from lra.lens import measures
from lra.lens.matrix import attention_matrix, double_copy

INSTRUMENTS = (
    "relative_error",
    "entropy",
    "normalised_entropy",
    "spectral_gap",
    "temperature",
    "softmax_temperature",
    "log_normality",
    "log_mean",
    "log_variance",
    "log_skewness",
    "log_kurtosis",
    "moment_match_error",
    "column_bias",
    "required_span",
    "row_sum",
    "empty_rows",
    "negative_share",
)
"""What `measure` reports of every attention, before the method's own diagnostics."""


@torch.no_grad()
def measure(
    module: Attention, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None
) -> tuple[dict[str, float], Tensor]:
    """Look at `module` on q, k, v: its numbers, averaged over sequences and heads, and its matrix.

    q, k, v, key_mask   as in a call
    returns             {instrument: value} with every name of INSTRUMENTS and those of `module.diagnostics`,
                        real tokens only; NaN where no head has a value; and P, (B, H, N, N) float64
    """
    matrix = attention_matrix(module, q, k, key_mask)
    q, k, v = q.double(), k.double(), v.double()
    output = matrix @ v
    exact = _softmax_like(module)(q, k, v, key_mask)
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    tables = []
    for b, rows in enumerate(real):
        if not rows.any():
            continue
        place = rows.nonzero().squeeze(1)
        table = measure_matrix(matrix[b][:, place[:, None], place], place)
        table["relative_error"] = measures.relative_error(output[b][:, place], exact[b][:, place])
        table["softmax_temperature"] = measures.softmax_temperature(q[b][:, place], k[b][:, place])
        # Moment matching wants var(ln P) = σ_q² σ_k², what softmax has for independent q and k (LLN paper, §4).
        spread = q[b][:, place].flatten(1).var(-1) * k[b][:, place].flatten(1).var(-1)
        table["moment_match_error"] = table["log_variance"] - spread
        tables.append(table)
    values = {name: _mean([table[name] for table in tables]) for name in INSTRUMENTS}
    return values | (double_copy(module).diagnostics(q, k, key_mask) if tables else {}), matrix


def measure_matrix(matrix: Tensor, positions: Tensor | None = None) -> dict[str, Tensor]:
    """Every instrument that needs P alone: {name: (...)} for P (..., N, N) of real tokens at `positions`."""
    moments = measures.log_normality(matrix)
    sums = measures.row_sums(matrix)
    return {
        "entropy": measures.entropy(matrix),
        "normalised_entropy": measures.normalised_entropy(matrix),
        "spectral_gap": measures.spectral_gap(matrix),
        "temperature": moments.variance.rsqrt(),
        "log_normality": moments.distance,
        "log_mean": moments.mean,
        "log_variance": moments.variance,
        "log_skewness": moments.skewness,
        "log_kurtosis": moments.excess_kurtosis,
        "column_bias": measures.column_bias(matrix),
        "required_span": measures.required_span(matrix, positions),
        "row_sum": sums.mean(-1),
        "empty_rows": (matrix.abs().sum(-1) == 0).double().mean(-1),
        "negative_share": measures.negative_share(matrix),
    }


def _softmax_like(module: Attention) -> Attention:
    return attention.build(
        "softmax",
        num_heads=module.num_heads,
        head_dim=module.head_dim,
        max_length=module.max_length,
        causal=module.causal,
    )


def _mean(values: list[Tensor]) -> float:
    """Mean over sequences and heads of what is defined."""
    return float(torch.cat([value.flatten() for value in values]).nanmean()) if values else math.nan
