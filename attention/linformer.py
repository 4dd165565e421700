"""Linformer: keys and values projected along the length to a fixed number of rows."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attention.base import Attention
from attention.registry import register
from kernels.common.inputs import check_flag, check_positive
from kernels.common.layout import compute_dtype, heads_last


@register("linformer")
class LinformerAttention(Attention):
    """softmax(q (E k)ᵀ / √D) (E v) with a learned E, (projected_length, N), shared by keys and values.

    Wang et al. 2020 (arXiv 2006.04768), equation 7; shared, and drawn as N(0, 0.02²), as in the small LRA setting.
    Rows of padding are zeroed before the projection; a call with N < max_length uses the first N columns of E.

    projected_length   rows that keys and values are projected to
    per_head           an E for each head; False: one for all, as in the code of the Long Range Arena
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_length: int,
        causal: bool = False,
        impl: str = "auto",
        projected_length: int = 256,
        per_head: bool = True,
    ):
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        check_positive(projected_length=projected_length)
        check_flag(per_head=per_head)
        if causal:
            raise ValueError("attention.causal=True is impossible for linformer: its projection mixes all positions")
        self.projection = nn.Parameter(0.02 * torch.randn(num_heads if per_head else 1, projected_length, max_length))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        query, key, value = (x.to(compute_dtype(q.dtype)) for x in (q, k, v))
        if key_mask is not None:
            key, value = (x.masked_fill(~key_mask[:, None, :, None], 0.0) for x in (key, value))
        projection = self.projection[:, :, : q.shape[2]].to(query.dtype)
        out = scaled_dot_product_attention(query, projection @ key, projection @ value)
        return heads_last(out, key_mask, q.dtype)
