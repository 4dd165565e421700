"""Exact softmax attention: the baseline that everybody is compared with."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention.base import Attention
from attention.registry import register
from kernels import softmax
from kernels.common.layout import heads_last


@register("softmax")
class SoftmaxAttention(Attention):
    """softmax(q kᵀ / √D) v by the fastest exact path of the device that PyTorch has.

    That is SDPA; with a key mask, in 16 bits on a GPU and not causal, flash attention over the real tokens alone.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if key_mask is not None and not self.causal and softmax.refusal(q) is None:
            return softmax.packed_attention(q, k, v, key_mask)
        return softmax_attention(q, k, v, key_mask, self.causal)

    def implementation(self, device: torch.device, compiled: bool = False) -> str:
        """SDPA; on a GPU also flash attention of sequences of variable length, for masked calls in 16 bits."""
        return "sdpa+varlen" if device.type == "cuda" and not self.causal else "sdpa"


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √D) v over the real keys by SDPA; arguments and result as in `attention.base.Attention`."""
    if key_mask is None:
        return heads_last(scaled_dot_product_attention(q, k, v, is_causal=causal))
    # A query that may see no key at all would give NaN: let it see something, its row is dropped below.
    visible = (key_mask | ~key_mask.any(-1, keepdim=True))[:, None, None, :]  # (B, 1, 1, N)
    if causal:
        length = q.shape[2]
        past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        visible = (visible & past) | torch.eye(length, dtype=torch.bool, device=q.device)
    return heads_last(scaled_dot_product_attention(q, k, v, attn_mask=visible), key_mask)
