"""Exact attention that skips tiles of padding: FlexAttention under a block mask made from counts."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 128
"""Tokens of a side of a tile that FlexAttention computes or skips."""


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v over the real keys, (B, H, N, D), zero for padded queries; worth it only when compiled."""
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
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]
