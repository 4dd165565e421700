"""Concentration against temperature: the curves of the LLN paper, for any attention on any q, k, v."""

from collections.abc import Iterable

import torch
from torch import Tensor

from attention import Attention
from lra.lens.measurement import measure

SCALES = (0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0)
"""Factors on q and k: on standard Gaussian inputs, softmax temperatures 8 to 0.25."""


def gaussian_qkv(batch: int, heads: int, length: int, dim: int, *, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """q, k ~ N(0, scale²) and v ~ N(0, 1), (B, H, N, D) float64; the draw of a seed is the same at every scale."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    return [scale * q, scale * k, v]


def sweep(
    module: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    scales: Iterable[float] = SCALES,
) -> list[dict[str, float]]:
    """What `measure` tells of `module` with q and k multiplied by each scale, `scale` itself included.

    The temperature of softmax falls with the square of the scale: read the curves against `softmax_temperature`.
    """
    return [{"scale": scale, **measure(module, scale * q, scale * k, v, key_mask)[0]} for scale in scales]
