"""Combiner's launches as operators, and their gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.combiner import triton, triton_axial, triton_backward, triton_logsparse
from kernels.common.launch import unit_last_stride
from kernels.common.ops import refuse_create_graph, register_op

PATTERNS: dict[str, tuple[Callable, Callable, Callable]] = {
    "fixed": (triton.allocate, triton.forward, triton_backward.backward),
    "logsparse": (triton_logsparse.allocate, triton_logsparse.forward, triton_logsparse.backward),
    "axial": (triton_axial.allocate, triton_axial.forward, triton_axial.backward),
}
"""By pattern: what a call allocates, its output first, and its launches, forward and backward."""


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, pattern: str, span: int, causal: bool, include_own: bool
) -> list[Tensor]:
    return PATTERNS[pattern][1](q, k, v, key_mask, span, causal, include_own)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, pattern: str, span: int, *_: object
) -> list[Tensor]:
    return PATTERNS[pattern][0](q, span)


def _run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: list[Tensor],
    pattern: str, span: int, causal: bool, include_own: bool,
) -> list[Tensor]:  # fmt: skip
    return PATTERNS[pattern][2](grad, q, k, v, key_mask, state, span, causal, include_own)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: list[Tensor],
    pattern: str, span: int, *_: object,
) -> list[Tensor]:  # fmt: skip
    if pattern == "axial":
        return triton_axial.allocate_gradients(q, k, v, span)
    return [torch.empty_like(x) for x in (q, k, v)]


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask"
_OPTIONS = "str pattern, int span, bool causal, bool include_own"
forward = register_op("combiner_forward", f"({_INPUTS}, {_OPTIONS}) -> Tensor[]", _run_forward, _forward)
backward = register_op(
    "combiner_backward", f"(Tensor grad, {_INPUTS}, Tensor[] state, {_OPTIONS}) -> Tensor[]", _run_backward, _backward
)


class _Combiner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_mask, *options):
        state = forward(q, k, v, key_mask, *options)
        ctx.save_for_backward(q, k, v, key_mask, *state)
        ctx.options = options
        return state[0]

    @staticmethod
    def backward(ctx, *grads):
        refuse_create_graph()
        q, k, v, key_mask, *state = ctx.saved_tensors
        grads = backward(unit_last_stride(grads[0]), q, k, v, key_mask, state, *ctx.options)
        return *grads, None, None, None, None, None


def combiner(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
    *, pattern: str, segment_length: int, include_own_span: bool, causal: bool,
) -> Tensor:  # fmt: skip
    """`kernels.combiner.api.combiner` through the kernels."""
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    return _Combiner.apply(q, k, v, key_mask, pattern, segment_length, causal, include_own_span)
