"""No attention at all: the floor of speed."""

from torch import Tensor

from attention.base import Attention
from attention.registry import register
from kernels.common.layout import heads_last


@register("none")
class NoAttention(Attention):
    """Passes v through, so that a model step with it costs everything except the attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return heads_last(v, key_mask)
