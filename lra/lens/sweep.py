"""Concentration against temperature on Gaussian queries and keys: the curves of the LLN paper."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from attention import Attention
from lra.lens import measures
from lra.lens.matrix import attention_matrix

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)
"""Standard deviations of q and k that a sweep visits: softmax temperatures 16 to 0.16."""

SWEEP_LENGTH = 256
"""Tokens of a sweep: long enough for the statistics, short enough for all eigenvalues."""


class Concentration(NamedTuple):
    """How concentrated one attention is at one scale of q and k, averaged over heads and draws."""

    attention: str
    scale: float
    softmax_temperature: float
    entropy: float
    spectral_gap: float
    log_variance: float


def gaussian_qkv(batch: int, heads: int, length: int, dim: int, *, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """q, k ~ N(0, scale²) and v ~ N(0, 1), (B, H, N, D) float64; the draw of a seed is the same at every scale."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    return [scale * q, scale * k, v]


def sweep(
    modules: Mapping[str, Attention],
    scales: Iterable[float] = SCALES,
    *,
    length: int = SWEEP_LENGTH,
    seeds: Iterable[int] = (0, 1, 2),
) -> Iterator[Concentration]:
    """Entropy (bits), spectral gap and var(ln P) of each attention, with q and k scaled alike, one row a point."""
    seeds = tuple(seeds)
    for scale in scales:
        for name, module in modules.items():
            draws = [concentration(module, length, scale=scale, seed=seed) for seed in seeds]
            yield Concentration(name, scale, *torch.stack(draws).nanmean(0).tolist())


def concentration(module: Attention, length: int, *, scale: float, seed: int) -> Tensor:
    """(softmax temperature, entropy, spectral gap, var ln P) of one Gaussian draw, averaged over heads."""
    q, k, _ = gaussian_qkv(1, module.num_heads, length, module.head_dim, scale=scale, seed=seed)
    matrix = attention_matrix(module, q, k)
    each = (
        measures.softmax_temperature(q, k),
        measures.entropy(matrix),
        measures.spectral_gap(matrix),
        measures.log_normality(matrix).variance,
    )
    return torch.stack([value.nanmean() for value in each])
