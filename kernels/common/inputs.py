"""Validation that every attention call shares; each refusal is one line that names the argument."""

from collections.abc import Collection

import torch
from torch import Tensor


def check_positive(**values: int) -> None:
    """Raise ValueError for a value that is not a positive integer."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"attention.{name}={value!r} must be a positive integer")


def check_flag(**values: bool) -> None:
    """Raise ValueError for a value that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"attention.{name}={value!r} must be true or false")


def check_choice(allowed: Collection[str], **values: object) -> None:
    """Raise ValueError for a value that is not one of `allowed`."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"attention.{name}={value} must be one of {', '.join(allowed)}")


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *, num_heads: int, head_dim: int, max_length: int
) -> None:
    """Raise ValueError or TypeError, in one line, for inputs that break the contract of `attention.base`."""
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            "q, k and v must share one shape (B, H, N, D), got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    batch, heads, length, dim = q.shape
    if (heads, dim) != (num_heads, head_dim):
        raise ValueError(f"q has {heads} heads of {dim}, but the module was built for {num_heads} heads of {head_dim}")
    if not 1 <= length <= max_length:
        raise ValueError(f"q has length {length}, but the module was built for 1 <= N <= max_length={max_length}")
    if not q.dtype.is_floating_point or q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"q, k and v must share one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.device != k.device or q.device != v.device or (key_mask is not None and key_mask.device != q.device):
        raise ValueError("q, k, v and key_mask must be on one device")
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be bool with True = real token, got {key_mask.dtype}")
    if key_mask.shape != (batch, length):
        raise ValueError(f"key_mask must be (B, N) = ({batch}, {length}), got {tuple(key_mask.shape)}")
