"""Exact softmax attention: the baseline that everybody is compared with."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attention.base import Attention
from attention.registry import register
from kernels.common.layout import heads_last

TILE = 128
"""Tokens of a side of a tile that FlexAttention computes or skips."""


@register("softmax")
class SoftmaxAttention(Attention):
    """softmax(q kᵀ / √D) v through PyTorch's SDPA, the fastest exact backend of the device."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return softmax_attention(q, k, v, key_mask, self.causal)

    def implementation(self, device: torch.device, compiled: bool = False) -> str:
        """SDPA, everywhere."""
        return "sdpa"


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


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """The same by FlexAttention, (B, H, N, D), zero for padded queries; worth it only when compiled."""
    out = flex_attention(q, k, v, block_mask=tiles(key_mask))
    assert isinstance(out, Tensor)
    return out * key_mask[:, None, :, None]


def tiles(key_mask: Tensor) -> BlockMask:
    """Which tiles of the attention matrix hold a real query and a real key, for a key mask (B, N).

    Made from counts of tiles, O(B (N / TILE)²), where `create_block_mask` would look at every pair of tokens.
    """
    length = key_mask.shape[1]
    tiled = functional.pad(key_mask, (0, -length % TILE)).unflatten(1, (-1, TILE))  # (B, tiles, TILE)
    some, every = tiled.any(-1), tiled.all(-1)
    computed = some[:, :, None] & some[:, None, :]  # (B, query tiles, key tiles)
    return BlockMask.from_kv_blocks(
        *_listed(computed & ~every[:, None, :]),
        *_listed(computed & every[:, None, :]),
        BLOCK_SIZE=TILE,
        mask_mod=lambda b, h, i, j: key_mask[b, j],
        seq_lengths=(length, length),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of tiles: how many key tiles are chosen, and all key tiles, the chosen ones first."""
    # By counting, not sorting: it is as quick, and a sort that torch 2.11 compiled for three tiles put them wrongly.
    count, earlier = chosen.sum(-1, keepdim=True), chosen.cumsum(-1)
    tile = torch.arange(chosen.shape[-1], device=chosen.device).expand_as(chosen)
    place = torch.where(chosen, earlier - 1, count + tile - earlier)
    order = torch.empty_like(place).scatter_(-1, place, tile)
    return count.squeeze(-1).int()[:, None], order.int()[:, None]
