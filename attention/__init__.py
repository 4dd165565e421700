"""Efficient attention modules: one file a method, one contract for all.

    module = attention.build("lln_diag", num_heads=2, head_dim=32, max_length=2048)
    out = module(q, k, v, key_mask)

    layer = attention.layer("lln_diag", dim=64, num_heads=2, max_length=2048)  # with its projections
    out = layer(x, key_mask)

See `attention.base.Attention` and `attention.self_attention.SelfAttention` for the contracts.
"""

from attention.base import Attention
from attention.registry import build, names, options, register
from attention.self_attention import SelfAttention, layer

__all__ = ["Attention", "SelfAttention", "build", "layer", "names", "options", "register"]
