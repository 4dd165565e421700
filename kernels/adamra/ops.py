"""AdaMRA's launches as operators, and their gradient."""

import torch
from torch import Tensor

from kernels.adamra import triton
from kernels.common.launch import block_dim, state_dtype, unit_last_stride
from kernels.common.ops import refuse_create_graph, register_op


def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, router: Tensor | None, alpha: Tensor, beta: Tensor,
    rates: list[int], scaled: bool, balance_weight: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, heads, length, dim = q.shape
    width, dtype, count = block_dim(dim), state_dtype(q.dtype), len(rates)
    return (
        q.new_empty(batch, length, heads, dim).transpose(1, 2),
        q.new_empty((), dtype=dtype),
        q.new_empty(batch * heads * count, width, width, dtype=dtype),
        q.new_empty(batch * heads * count, 3, width, dtype=dtype),
        q.new_empty(batch * heads, length, dtype=torch.int32),
        q.new_empty(heads, 1 << (count - 1).bit_length(), dtype=dtype),
    )


def _backward(
    grad: Tensor, grad_balance: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
    router: Tensor | None, *_: object,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(x) for x in (q, k, v, router) if x is not None]


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? router, Tensor alpha, Tensor beta"
_STATE = "Tensor context, Tensor log_mass, Tensor choice, Tensor pull"
_OPTIONS = "int[] rates, bool scaled"
forward = register_op(
    "adamra_forward",
    f"({_INPUTS}, {_OPTIONS}, float balance_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton.forward,
    _forward,
)
backward = register_op(
    "adamra_backward",
    f"(Tensor grad, Tensor grad_balance, {_INPUTS}, {_STATE}, {_OPTIONS}) -> Tensor[]",
    triton.backward,
    _backward,
)


class _AdaMRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_mask, router, alpha, beta, rates, scaled, balance_weight):
        out, balance, *state = forward(q, k, v, key_mask, router, alpha, beta, rates, scaled, balance_weight)
        ctx.save_for_backward(q, k, v, key_mask, router, alpha, beta, *state)
        ctx.options = (rates, scaled)
        return out, balance

    @staticmethod
    def backward(ctx, *grads):
        refuse_create_graph()
        grad, grad_balance = grads
        grads = backward(unit_last_stride(grad), grad_balance, *ctx.saved_tensors, *ctx.options)
        router = grads[3] if len(grads) > 3 else None
        return *grads[:3], None, router, None, None, None, None, None


def adamra(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, router: Tensor | None, scales: tuple[Tensor, Tensor],
    rates: list[int], gate: str, balance_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.adamra.api.adamra` with exponential map and mean compression, through the kernels."""
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    router = None if router is None else router.contiguous()
    alpha, beta = (x.detach().contiguous() for x in scales)
    return _AdaMRA.apply(q, k, v, key_mask, router, alpha, beta, rates, gate == "top1", balance_weight)
