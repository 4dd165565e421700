"""Attention without padding as operators, and its gradient.

Opaque ones, counting included: torch 2.11 compiled a sort of the mask's tiles, and FlexAttention over lists made in the
same graph, to wrong results.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.common.launch import unit_last_stride
from kernels.common.ops import refuse_create_graph, register_op
from kernels.softmax import triton


def flash_forward(packed: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √D) v inside each of B segments of the rows of `packed` = (q, k, v), (3, T, H, D).

    starts   (B + 1,) int32, first row of each segment, then the end of the last; none is longer than `length`

    Returns out (T, H, D) and the logarithm of the softmax's denominators, float32 (H, T). Rows that are in no segment
    are neither read nor written. (cuDNN's call for such sequences gives wrong gradients in torch 2.11.)
    """
    q, k, v = packed.unbind()
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, length, length, dropout_p=0.0, is_causal=False, return_debug_mask=False
    )
    return out, log_sum


def flash_backward(
    grad: Tensor, packed: Tensor, out: Tensor, log_sum: Tensor, starts: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, (T, H, D) each, from that of out; again without the rows that are in no segment."""
    q, k, v = packed.unbind()
    state = torch.empty(0, dtype=torch.uint64, device=q.device)  # of random numbers: there is no dropout
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, log_sum, starts, starts, length, length, 0.0, False, state, state
    )


def _run_segments(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    ends = key_mask.flatten().cumsum(0, dtype=torch.int32)
    return ends, functional.pad(ends[key_mask.shape[1] - 1 :: key_mask.shape[1]], (1, 0))


def _segments(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    batch, length = key_mask.shape
    return key_mask.new_empty(batch * length, dtype=torch.int32), key_mask.new_empty(batch + 1, dtype=torch.int32)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, ends: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, dim = q.shape
    packed = q.new_empty(3, batch * length, heads, dim)
    for x, rows in zip((q, k, v), packed, strict=True):
        triton.pack(x, key_mask, ends, rows)
    out, log_sum = flash_forward(packed, starts, length)
    return triton.unpack(out, key_mask, ends), packed, out, log_sum


def _forward(q: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, dim = q.shape
    rows = batch * length
    return (
        q.new_empty(batch, length, heads, dim).transpose(1, 2),
        q.new_empty(3, rows, heads, dim),
        q.new_empty(rows, heads, dim),
        q.new_empty(heads, rows, dtype=torch.float32),
    )


def _run_backward(
    grad: Tensor, packed: Tensor, out: Tensor, log_sum: Tensor, key_mask: Tensor, ends: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.empty_like(out)
    triton.pack(grad, key_mask, ends, rows)
    q, k, v = flash_backward(rows, packed, out, log_sum, starts, grad.shape[2])
    return triton.unpack(q, key_mask, ends), triton.unpack(k, key_mask, ends), triton.unpack(v, key_mask, ends)


def _backward(grad: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, dim = grad.shape
    q, k, v = (grad.new_empty(batch, length, heads, dim).transpose(1, 2) for _ in range(3))
    return q, k, v


segments = register_op("softmax_segments", "(Tensor key_mask) -> (Tensor, Tensor)", _run_segments, _segments)
forward = register_op(
    "softmax_packed_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor key_mask, Tensor ends, Tensor starts) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_forward,
    _forward,
)
backward = register_op(
    "softmax_packed_backward",
    "(Tensor grad, Tensor packed, Tensor out, Tensor log_sum, Tensor key_mask, Tensor ends, Tensor starts)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _backward,
)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_mask):
        ends, starts = segments(key_mask)
        out, *saved = forward(q, k, v, key_mask, ends, starts)
        ctx.save_for_backward(*saved, key_mask, ends, starts)
        return out

    @staticmethod
    def backward(ctx, *grads):
        refuse_create_graph()
        return *backward(unit_last_stride(grads[0]), *ctx.saved_tensors), None


def packed_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """`kernels.softmax.api.packed_attention`, of what it takes."""
    return _PackedAttention.apply(*(unit_last_stride(x) for x in (q, k, v)), key_mask)
