"""Key masks, what padded tokens hold, and softmax over what is visible."""

import torch
from torch import Tensor

from kernels.common.layout import compute_dtype


def real_tokens(q: Tensor, key_mask: Tensor | None) -> Tensor:
    """The key mask of a call, (B, N) bool; all True where none was given."""
    return q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if key_mask is None else key_mask


def real_values(x: Tensor, real: Tensor) -> Tensor:
    """x (B, H, N, D) in the dtype of computation, zero at padded tokens: what they held cannot matter, not even inf."""
    return x.to(compute_dtype(x.dtype)).masked_fill(~real[:, None, :, None], 0.0)


def masked_softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible entries of the last dimension, exactly zero elsewhere.

    Where nothing is visible it is uniform, never NaN: a result to be dropped, with zero gradients then.
    """
    return logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(-1)
