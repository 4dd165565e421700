"""Names to modules: a method registers itself, and its variants, by being a file in this folder."""

from typing import Any

from attention.base import Attention
from kernels.common.registry import Registry

COMMON = ("num_heads", "head_dim", "max_length", "causal", "impl")
"""Arguments that every attention takes; all others are the method's own options."""

attentions = Registry[Attention]("attention", "attention", COMMON)
register, names, options = attentions.register, attentions.names, attentions.options


def build(
    name: str,
    *,
    num_heads: int,
    head_dim: int,
    max_length: int,
    causal: bool = False,
    impl: str = "auto",
    **method_options: Any,
) -> Attention:
    """Build the attention `name`.

    num_heads, head_dim   H and D of the inputs it will see
    max_length            longest N it will see; sizes parameters that depend on the length
    causal                position i attends to j <= i; refused in one line where a method has no causal form
    impl                  "auto" (see `kernels.common.dispatch`) | "reference" | "triton"
    method_options        the method's own, see `options(name)`; ValueError names an unknown or impossible one
    """
    common = dict(num_heads=num_heads, head_dim=head_dim, max_length=max_length, causal=causal, impl=impl)
    return attentions.build(name, common=common, **method_options)
