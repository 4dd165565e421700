"""Key masks, and what padded tokens hold."""

import torch
from torch import Tensor

from kernels.common.layout import compute_dtype


def real_tokens(q: Tensor, key_mask: Tensor | None) -> Tensor:
    """The key mask of a call, (B, N) bool; all True where none was given."""
    return q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if key_mask is None else key_mask


def real_values(x: Tensor, real: Tensor) -> Tensor:
    """x (B, H, N, D) in the dtype of computation, zero at padded tokens: what they held cannot matter, not even inf."""
    return x.to(compute_dtype(x.dtype)).masked_fill(~real[:, None, :, None], 0.0)
