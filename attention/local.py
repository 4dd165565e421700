"""Local attention of the Long Range Arena: exact softmax inside non-overlapping blocks."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from attention.base import Attention
from attention.registry import register
from attention.softmax import softmax_attention
from kernels.common.inputs import check_positive
from kernels.common.layout import heads_last


@register("local")
class LocalAttention(Attention):
    """Token i attends to the real tokens j of its own block, ⌊i / block_size⌋ = ⌊j / block_size⌋.

    Tay et al. 2020 (arXiv 2011.04006), the row "Local Attention": blocks do not overlap.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_length: int,
        causal: bool = False,
        impl: str = "auto",
        block_size: int = 64,
    ):
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        check_positive(block_size=block_size)
        self.block_size = block_size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        batch, heads, length, dim = q.shape
        size = min(self.block_size, length)
        missing = -length % size  # tokens that the last block lacks

        def blocks(x: Tensor) -> Tensor:  # (B, H, N, D) -> (B · blocks, H, size, D)
            x = pad(x, (0, 0, 0, missing)).unflatten(2, (-1, size))
            return x.transpose(1, 2).flatten(0, 1)

        if key_mask is None and missing:
            key_mask = torch.ones(batch, length, dtype=torch.bool, device=q.device)
        mask = None if key_mask is None else pad(key_mask, (0, missing)).view(-1, size)
        out = softmax_attention(blocks(q), blocks(k), blocks(v), mask, self.causal)
        out = out.transpose(1, 2).reshape(batch, length + missing, heads, dim)[:, :length]
        return heads_last(out.transpose(1, 2))
