"""Random inputs of an attention call."""

import torch
from torch import Tensor


def qkv(
    batch: int,
    heads: int,
    length: int,
    dim: int,
    *,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> list[Tensor]:
    """q, k, v ~ N(0, scale²), (B, H, N, D), the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, dim)
    return [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_(requires_grad)
        for _ in range(3)
    ]


def padding(batch: int, length: int, *, kind: str = "suffix", seed: int = 0) -> Tensor:
    """A (B, N) key mask, True = real.

    kind   "suffix": real prefixes of random length >= 1 | "scattered": each token real with probability 0.7
           | "one": a single real token | "empty": the last sequence has no real token, the others are suffixes
    """
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(length)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    if kind == "suffix":
        return positions < lengths
    if kind == "scattered":
        mask = torch.rand(batch, length, generator=generator) < 0.7
        mask[:, length // 2] = True
        return mask
    if kind == "one":
        return positions == lengths - 1
    if kind == "empty":
        mask = positions < lengths
        mask[-1] = False
        return mask
    raise ValueError(f"unknown kind of padding {kind!r}")
