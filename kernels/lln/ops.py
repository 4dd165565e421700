"""LLN's launches as operators, and their gradient."""

import torch
from torch import Tensor

from kernels.common.launch import block_dim, state_dtype, unit_last_stride
from kernels.common.ops import refuse_create_graph, register_op
from kernels.lln import triton, triton_moments


def _moments(q: Tensor, k: Tensor, key_mask: Tensor | None, rates: list[int], a: float, b: float) -> Tensor:
    return q.new_empty(4, len(rates), dtype=state_dtype(q.dtype))


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, alpha: Tensor, beta: Tensor,
    diag: bool, weight_lln: float, weight_diag: float, mix_lln: Tensor | None, mix_diag: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    learned = None if mix_lln is None or mix_diag is None else (mix_lln, mix_diag)
    return triton.forward(q, k, v, key_mask, alpha, beta, diag, (weight_lln, weight_diag), learned)


def _forward(q: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, dim = q.shape
    width, dtype = block_dim(dim), state_dtype(q.dtype)
    return (
        q.new_empty(batch, length, heads, dim).transpose(1, 2),
        q.new_empty(batch * heads, width, width, dtype=dtype),
        q.new_empty(batch * heads, 3, width, dtype=dtype),
    )


def _run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, alpha: Tensor, beta: Tensor,
    context: Tensor, log_mass: Tensor,
    diag: bool, weight_lln: float, weight_diag: float, mix_lln: Tensor | None, mix_diag: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    learned = None if mix_lln is None or mix_diag is None else (mix_lln, mix_diag)
    mix = (weight_lln, weight_diag)
    return list(triton.backward(grad, q, k, v, key_mask, alpha, beta, context, log_mass, diag, mix, learned))


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, alpha: Tensor, beta: Tensor,
    context: Tensor, log_mass: Tensor,
    diag: bool, weight_lln: float, weight_diag: float, mix_lln: Tensor | None, mix_diag: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    weights = [torch.empty_like(w) for w in (mix_lln, mix_diag) if w is not None]
    return [torch.empty_like(x) for x in (q, k, v)] + weights


moments = register_op(
    "lln_moments",
    "(Tensor q, Tensor k, Tensor? key_mask, int[] rates, float a, float b) -> Tensor",
    triton_moments.moments,
    _moments,
)
_OPTIONS = "bool diag, float weight_lln, float weight_diag, Tensor? mix_lln, Tensor? mix_diag"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor alpha, Tensor beta"
forward = register_op("lln_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _run_forward, _forward)
backward = register_op(
    "lln_backward",
    f"(Tensor grad, {_INPUTS}, Tensor context, Tensor log_mass, {_OPTIONS}) -> Tensor[]",
    _run_backward,
    _backward,
)


class _LLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_mask, alpha, beta, diag, weight_lln, weight_diag, mix_lln, mix_diag):
        out, context, log_mass = forward(
            q, k, v, key_mask, alpha, beta, diag, weight_lln, weight_diag, mix_lln, mix_diag
        )
        ctx.save_for_backward(q, k, v, key_mask, alpha, beta, context, log_mass, mix_lln, mix_diag)
        ctx.options = (diag, weight_lln, weight_diag)
        return out

    @staticmethod
    def backward(ctx, *grads):
        refuse_create_graph()
        *tensors, mix_lln, mix_diag = ctx.saved_tensors
        grads = backward(unit_last_stride(grads[0]), *tensors, *ctx.options, mix_lln, mix_diag)
        mixes = (None, None) if mix_lln is None else tuple(grads[3:])
        return *grads[:3], None, None, None, None, None, None, *mixes


def lln(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    mix: tuple[Tensor | float, Tensor | float] | None,
) -> Tensor:
    """`kernels.lln.api.lln`, not causal, through the kernels; weights in `mix` are two numbers or two (1, H, 1, D)."""
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    numbers, learned = (1.0, 0.0), (None, None)
    if mix is not None:
        first, second = mix
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            shape = (q.shape[1], q.shape[3])
            learned = tuple(w.reshape(shape).to(state_dtype(q.dtype)) for w in (first, second))
        elif not isinstance(first, Tensor) and not isinstance(second, Tensor):
            numbers = (float(first), float(second))
        else:
            raise ValueError(
                "attention.impl=triton mixes by two numbers or by two tensors (1, H, 1, D), not one of each"
            )
    return _LLN.apply(q, k, v, key_mask, alpha, beta, mix is not None, *numbers, *learned)


def measure(
    q: Tensor, k: Tensor, key_mask: Tensor | None, rates: tuple[int, ...], constants: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """σq, σk, α, β for keys fused at each rate, (R,) each."""
    out = moments(unit_last_stride(q.detach()), unit_last_stride(k.detach()), key_mask, list(rates), *constants)
    return out[0], out[1], out[2], out[3]
