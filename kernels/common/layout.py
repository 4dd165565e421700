"""The memory layout and dtypes that every attention returns and computes in."""

import torch
from torch import Tensor


def heads_last(out: Tensor, key_mask: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Bring a (B, H, N, D) result into the contract's form.

    Casts to `dtype`, sets rows of padded queries to zero (also where they hold NaN or inf), and lays the
    tensor out as (B, N, H, D) in memory, so that merging heads is a view.
    """
    out = out.to(dtype or out.dtype).transpose(1, 2)  # (B, N, H, D)
    if key_mask is not None:
        out = out.masked_fill(~key_mask[:, :, None, None], 0.0)
    return out.contiguous().transpose(1, 2)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a reference computes in: float32 for half precisions, else the input's own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
