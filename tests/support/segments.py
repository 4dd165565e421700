"""Attention inside segments from its definition: what stands in for PyTorch's flash attention on a CPU."""

from itertools import pairwise

import torch
from torch import Tensor


def forward(packed: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """As `kernels.softmax.ops.flash_forward`, by a loop over segments; rows that are in none hold NaN."""
    q, _, v = packed.unbind()
    out, log_sum = torch.full_like(q, torch.nan), q.new_full(q.shape[1::-1], torch.nan, dtype=torch.float32)
    for rows in _segments(starts, length):
        logits = _logits(packed, rows)
        out[rows] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[rows])
        log_sum[:, rows] = logits.logsumexp(-1).float()
    return out, log_sum


def backward(
    grad: Tensor, packed: Tensor, out: Tensor, log_sum: Tensor, starts: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.softmax.ops.flash_backward`: dS = P ∘ (dP − rowsum(dO ∘ O)); rows that are in no segment hold NaN."""
    dq, dk, dv = (torch.full_like(grad, torch.nan) for _ in range(3))
    q, k, v = packed.unbind()
    for rows in _segments(starts, length):
        logits = _logits(packed, rows)
        assert torch.allclose(log_sum[:, rows], logits.logsumexp(-1).float())
        weights = logits.softmax(-1)
        product = torch.einsum("qhd,khd->hqk", grad[rows], v[rows])
        shift = (grad[rows] * out[rows]).sum(-1).T[..., None]  # (H, rows, 1)
        slope = weights * (product - shift) / q.shape[-1] ** 0.5
        dq[rows] = torch.einsum("hqk,khd->qhd", slope, k[rows])
        dk[rows] = torch.einsum("hqk,qhd->khd", slope, q[rows])
        dv[rows] = torch.einsum("hqk,qhd->khd", weights, grad[rows])
    return dq, dk, dv


def _segments(starts: Tensor, length: int) -> list[slice]:
    assert starts.dtype == torch.int32
    bounds = starts.tolist()
    assert all(0 <= b - a <= length for a, b in pairwise(bounds))
    return [slice(a, b) for a, b in pairwise(bounds) if b > a]


def _logits(packed: Tensor, rows: slice) -> Tensor:  # (H, rows, rows)
    q, k, _ = packed[:, rows].unbind()
    return torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
