"""Efficient attention modules: one file a method, one contract for all.

    module = attention.build("lln_diag", num_heads=2, head_dim=32, max_length=2048)
    out = module(q, k, v, key_mask)

See `attention.base.Attention` for the contract.
"""

from attention.base import Attention
from attention.registry import build, names, options, register

__all__ = ["Attention", "build", "names", "options", "register"]
