"""Combiner's launches as operators, and their gradient."""

import torch
from torch import Tensor

from kernels.combiner import triton, triton_backward
from kernels.common.launch import block_dim, state_dtype, unit_last_stride
from kernels.common.ops import register_op


def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, span: int, causal: bool, include_own: bool
) -> tuple[Tensor, ...]:
    batch, heads, length, dim = q.shape
    spans, width, dtype = -(-length // span), block_dim(dim), state_dtype(q.dtype)
    return (
        q.new_empty(batch, length, heads, dim).transpose(1, 2),
        q.new_empty(batch * heads, length, dtype=dtype),
        *(q.new_empty(batch * heads, spans, width) for _ in range(3)),
        q.new_empty(batch * heads, spans, dtype=dtype),
        q.new_empty(batch * heads, length, dtype=dtype),
        q.new_empty(batch * heads, spans, 2, width, dtype=dtype),
    )


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v)]


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask"
_STATE = "Tensor out, Tensor norm, Tensor key, Tensor value, Tensor asking, Tensor bias, Tensor share, Tensor ties"
_OPTIONS = "int span, bool causal, bool include_own"
forward = register_op(
    "combiner_fixed",
    f"({_INPUTS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 8)})",
    triton.forward,
    _forward,
)
backward = register_op(
    "combiner_fixed_backward",
    f"(Tensor grad, {_INPUTS}, {_STATE}, {_OPTIONS}) -> Tensor[]",
    triton_backward.backward,
    _backward,
)


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_mask, span, causal, include_own):
        state = forward(q, k, v, key_mask, span, causal, include_own)
        ctx.save_for_backward(q, k, v, key_mask, *state)
        ctx.options = (span, causal, include_own)
        return state[0]

    @staticmethod
    def backward(ctx, *grads):
        grads = backward(unit_last_stride(grads[0]), *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None


def combiner(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
    *, pattern: str, segment_length: int, include_own_span: bool, causal: bool,
) -> Tensor:  # fmt: skip
    """`kernels.combiner.api.combiner` through the kernels."""
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    return _Fixed.apply(q, k, v, key_mask, segment_length, causal, include_own_span)
