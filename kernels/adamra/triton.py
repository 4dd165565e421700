"""AdaMRA-R in Triton: the query side, where every query reads the resolution it chose. The key side is LLN's.

    o_i = g_i Σ_l A_il C^r_l,   A_i = softmax_l(α_r q_il + λ^r_l),   r = r(i) = argmax_s w_s · q_i

All products with the R contexts run densely on the rows that chose each one: the tensor cores have time for it, and
neither queries nor outputs are moved. Only the chosen resolution is exponentiated.

Floor, in touches of one (B, H, N, D) tensor: moments 2, keys 2, queries 2, backward 3 and 4, in all 13. The choice is
saved as one byte a query, so that forward and backward cannot disagree about it.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import Config, arithmetic, block_dim, mask_arguments, split, state_dtype, strides
from kernels.common.tiles import NEVER, load_rows, place, product, real_rows, store_rows
from kernels.lln.triton import read_features
from kernels.lln.triton_keys import keys_backward, merge_gradients, summarise

# By padded head dimension.
QUERIES = {16: Config(128, 4, 2), 32: Config(128, 4, 2), 64: Config(128, 8, 2), 128: Config(64, 8, 1)}
QUERIES_BACKWARD = {16: Config(64, 4, 2), 32: Config(64, 8, 2), 64: Config(64, 8, 1), 128: Config(32, 16, 1)}

BALANCE_SLOTS = 256
"""Partials that the finishing program reads at once."""


@triton.jit
def route(
    q, router_ptr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Logits of the resolutions, (BLOCK_N, BLOCK_R), and their softmax; `router_ptr` points at the head's rows."""
    offset_d, offset_r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    logits = tl.full((BLOCK_N, BLOCK_R), NEVER, COMPUTE)
    for r in tl.static_range(R):
        row = tl.load(router_ptr + r * HEAD_DIM + offset_d, mask=offset_d < HEAD_DIM, other=0.0).to(COMPUTE)
        logits = tl.where(offset_r[None, :] == r, tl.sum(q * row[None, :], axis=1)[:, None], logits)
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return logits, weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def chosen_scales(
    choice, alpha_ptr, log_mass_ptr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """α (BLOCK_N,) and λ (BLOCK_N, BLOCK_D) of the resolution that each row chose."""
    offset_d = tl.arange(0, BLOCK_D)
    alpha = tl.zeros((BLOCK_N,), COMPUTE)
    log_mass = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for r in tl.static_range(R):
        here = choice == r
        alpha = tl.where(here, tl.load(alpha_ptr + r).to(COMPUTE), alpha)
        log_mass = tl.where(here[:, None], tl.load(log_mass_ptr + r * 3 * BLOCK_D + offset_d)[None, :], log_mass)
    return alpha, log_mass


@triton.jit
def queries_kernel(
    q_ptr, q_b, q_h, q_n,
    mask_ptr, mask_b, mask_n,
    router_ptr, alpha_ptr, context_ptr, log_mass_ptr,  # (H, R, D), (R,), (B·H, R, …)
    out_ptr, out_b, out_h, out_n,
    choice_ptr, count_ptr, probability_ptr,  # (B·H, N) bytes, slots (H, B, splits, R')
    length, num_batches, num_heads, splits, chunk,
    R: tl.constexpr, BLOCK_R: tl.constexpr, ROUTED: tl.constexpr, SCALED: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of one part of a head, and what the balance loss needs of it."""
    b, h, part = place(tl.program_id(0), num_heads, splits)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    q_ptr += b * q_b + wide_h * q_h
    out_ptr += b * out_b + wide_h * out_h
    mask_ptr += b * mask_b
    router_ptr += h * R * HEAD_DIM
    log_mass_ptr += head * R * 3 * BLOCK_D
    context_ptr += head * R * BLOCK_D * BLOCK_D
    offset_n, offset_d, offset_r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    square = offset_d[:, None] * BLOCK_D + offset_d[None, :]
    count, probability = tl.zeros((BLOCK_R,), COMPUTE), tl.zeros((BLOCK_R,), COMPUTE)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        keep = start + offset_n < length
        q = load_rows(q_ptr, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
        gate = tl.full((BLOCK_N,), 1.0, COMPUTE)
        if ROUTED:
            logits, shares = route(q, router_ptr, R, BLOCK_N, BLOCK_R, HEAD_DIM, BLOCK_D, COMPUTE)
            choice = tl.argmax(logits, axis=1, tie_break_left=True)
            tl.store(choice_ptr + head * length + start + offset_n, choice.to(tl.uint8), mask=keep)
            chosen = (choice[:, None] == offset_r[None, :]) & real[:, None]
            count += tl.sum(tl.where(chosen, 1.0, 0.0).to(COMPUTE), axis=0)
            probability += tl.sum(tl.where(real[:, None], shares, 0.0), axis=0)
            if SCALED:
                gate = tl.max(shares, axis=1)
        else:
            choice = tl.zeros((BLOCK_N,), tl.int32) + h % R
        alpha, log_mass = chosen_scales(choice, alpha_ptr, log_mass_ptr, R, BLOCK_N, BLOCK_D, COMPUTE)
        features = read_features(q, alpha[:, None], log_mass)
        out = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for r in tl.static_range(R):
            context = tl.load(context_ptr + r * BLOCK_D * BLOCK_D + square)
            mine = tl.where((choice == r)[:, None], features, 0.0)
            out += product(mine, context, COMPUTE, OPERAND, PRECISION)
        out = tl.where(real[:, None], out * gate[:, None], 0.0)
        store_rows(out_ptr, out_n, start, offset_n, keep, out, HEAD_DIM, BLOCK_D)
    if ROUTED:
        slot = ((wide_h * num_batches + b) * splits + part) * BLOCK_R + offset_r
        tl.store(count_ptr + slot, count)
        tl.store(probability_ptr + slot, probability)


@triton.jit
def balance_kernel(
    count_ptr, probability_ptr, balance_ptr, pull_ptr, slots, num_heads,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Balance loss R Σ_r f_r P_r, averaged over heads, and its derivative by each probability p_ir, `pull` (H, R')."""
    offset, offset_r = tl.arange(0, BLOCK), tl.arange(0, BLOCK_R)
    balance = tl.zeros((BLOCK_R,), COMPUTE)
    for h in range(num_heads):
        counts, probabilities = tl.zeros((BLOCK, BLOCK_R), COMPUTE), tl.zeros((BLOCK, BLOCK_R), COMPUTE)
        for first in range(0, slots, BLOCK):
            position = (tl.cast(h, tl.int64) * slots + first + offset[:, None]) * BLOCK_R + offset_r[None, :]
            inside = (first + offset < slots)[:, None]
            counts += tl.load(count_ptr + position, mask=inside, other=0.0)
            probabilities += tl.load(probability_ptr + position, mask=inside, other=0.0)
        count = tl.sum(counts, axis=0)
        total = tl.maximum(tl.sum(count), 1.0)
        pull = count / total * (R / total) / num_heads
        balance += pull * tl.where(offset_r < R, tl.sum(probabilities, axis=0), 0.0)
        tl.store(pull_ptr + h * BLOCK_R + offset_r, pull)
    tl.store(balance_ptr, tl.sum(balance))


@triton.jit
def queries_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    router_ptr, alpha_ptr, context_ptr, log_mass_ptr, choice_ptr, pull_ptr, grad_balance_ptr,
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_context_ptr, grad_mass_ptr, grad_router_ptr,  # slots (B·H, splits, R', …)
    length, num_heads, splits, chunk,
    R: tl.constexpr, BLOCK_R: tl.constexpr, ROUTED: tl.constexpr, SCALED: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one part of a head, and its share of the gradients of the summaries and of the router.

    With y_i the chosen read: dg_i = do_i · y_i, and the logits of the router get g_i (1[r = r(i)] − p_ir) dg_i from
    the gate and p_ir (b_r − Σ_s p_is b_s) from the balance loss, b = ∂ loss / ∂ p.
    """
    b, h, part = place(tl.program_id(0), num_heads, splits)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    q_ptr += b * q_b + wide_h * q_h
    grad_ptr += b * grad_b + wide_h * grad_h
    grad_q_ptr += b * gq_b + wide_h * gq_h
    mask_ptr += b * mask_b
    router_ptr += h * R * HEAD_DIM
    log_mass_ptr += head * R * 3 * BLOCK_D
    context_ptr += head * R * BLOCK_D * BLOCK_D
    offset_n, offset_d, offset_r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    square = offset_d[:, None] * BLOCK_D + offset_d[None, :]
    if ROUTED:
        pull = tl.load(pull_ptr + h * BLOCK_R + offset_r) * tl.load(grad_balance_ptr).to(COMPUTE)
    grad_context = tl.zeros((BLOCK_R * BLOCK_D, BLOCK_D), COMPUTE)
    grad_mass = tl.zeros((BLOCK_R, BLOCK_D), COMPUTE)
    grad_router = tl.zeros((BLOCK_R, BLOCK_D), COMPUTE)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        keep = start + offset_n < length
        q = load_rows(q_ptr, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
        grad = load_rows(grad_ptr, grad_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        gate = tl.full((BLOCK_N,), 1.0, COMPUTE)
        if ROUTED:
            choice = tl.load(choice_ptr + head * length + start + offset_n, mask=keep, other=0).to(tl.int32)
            _, shares = route(q, router_ptr, R, BLOCK_N, BLOCK_R, HEAD_DIM, BLOCK_D, COMPUTE)
        else:
            choice = tl.zeros((BLOCK_N,), tl.int32) + h % R
        chosen = choice[:, None] == offset_r[None, :]  # (BLOCK_N, BLOCK_R)
        if ROUTED and SCALED:
            gate = tl.sum(tl.where(chosen, shares, 0.0), axis=1)
        alpha, log_mass = chosen_scales(choice, alpha_ptr, log_mass_ptr, R, BLOCK_N, BLOCK_D, COMPUTE)
        features = read_features(q, alpha[:, None], log_mass)
        reading = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for r in tl.static_range(R):
            context = tl.load(context_ptr + r * BLOCK_D * BLOCK_D + square)
            dense = product(grad, tl.trans(context), COMPUTE, OPERAND, PRECISION)
            reading = tl.where((choice == r)[:, None], dense, reading)
        grad_gate = tl.sum(features * reading, axis=1)
        grad_logits = gate[:, None] * features * (reading - grad_gate[:, None])
        grad_q = alpha[:, None] * grad_logits

        gated = features * gate[:, None]
        stacked = tl.where(chosen[:, :, None], gated[:, None, :], 0.0)
        stacked = tl.reshape(stacked, (BLOCK_N, BLOCK_R * BLOCK_D))
        grad_context += product(tl.trans(stacked), grad, COMPUTE, OPERAND, PRECISION)
        grad_mass += tl.sum(tl.where(chosen[:, :, None], grad_logits[:, None, :], 0.0), axis=0)
        if ROUTED:
            routing = shares * (pull[None, :] - tl.sum(shares * pull[None, :], axis=1)[:, None])
            if SCALED:
                routing += (gate * grad_gate)[:, None] * (tl.where(chosen, 1.0, 0.0) - shares)
            routing = tl.where(real[:, None] & (offset_r < R)[None, :], routing, 0.0)
            grad_router += tl.sum(routing[:, :, None] * q[:, None, :], axis=0)
            for r in tl.static_range(R):
                row = tl.load(router_ptr + r * HEAD_DIM + offset_d, mask=offset_d < HEAD_DIM, other=0.0).to(COMPUTE)
                column = tl.sum(tl.where(offset_r[None, :] == r, routing, 0.0), axis=1)
                grad_q += column[:, None] * row[None, :]
        store_rows(grad_q_ptr, gq_n, start, offset_n, keep, grad_q, HEAD_DIM, BLOCK_D)
    slot = head * splits + part
    rows = offset_r[:, None] * BLOCK_D + offset_d[None, :]
    stacked_rows = tl.arange(0, BLOCK_R * BLOCK_D)[:, None] * BLOCK_D + offset_d[None, :]
    tl.store(grad_context_ptr + slot * BLOCK_R * BLOCK_D * BLOCK_D + stacked_rows, grad_context)
    tl.store(grad_mass_ptr + slot * BLOCK_R * BLOCK_D + rows, grad_mass)
    if ROUTED:
        tl.store(grad_router_ptr + slot * BLOCK_R * BLOCK_D + rows, grad_router)


# ------------------------------------------------------------------------------------------------------------ launches


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, router: Tensor | None, alpha: Tensor, beta: Tensor,
    rates: list[int], scaled: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output (B, H, N, D), laid out as (B, N, H, D), balance loss, then what the backward pass reads.

    router   (H, R, D) contiguous; None: head h reads resolution h mod R
    scaled   whether the output is multiplied by the chosen probability
    """
    batch, heads, length, dim = q.shape
    width, kinds, count = block_dim(dim), arithmetic(q.dtype), len(rates)
    block = triton.next_power_of_2(count)
    options = dict(dtype=state_dtype(q.dtype), device=q.device)
    context, log_mass = summarise(k, v, key_mask, beta, tuple(rates))
    out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    choice = torch.empty(batch * heads, length, dtype=torch.uint8, device=q.device)
    config = QUERIES[width]
    splits, chunk = split(length, config.rows, batch * heads)
    counts, probabilities = (torch.empty(heads, batch * splits, block, **options) for _ in range(2))
    queries_kernel[(batch * heads * splits,)](
        q, *strides(q), *mask_arguments(key_mask, q), context if router is None else router,
        alpha, context, log_mass, out, *strides(out), choice, counts, probabilities,
        length, batch, heads, splits, chunk,
        R=count, BLOCK_R=block, ROUTED=router is not None, SCALED=scaled, HAS_MASK=key_mask is not None,
        HEAD_DIM=dim, BLOCK_N=config.rows, BLOCK_D=width, **kinds, **config.options,
    )  # fmt: skip
    if router is None:
        balance, pull = torch.zeros((), **options), torch.zeros(heads, block, **options)
    else:
        balance, pull = torch.empty((), **options), torch.empty(heads, block, **options)
        balance_kernel[(1,)](
            counts, probabilities, balance, pull, batch * splits, heads,
            R=count, BLOCK_R=block, BLOCK=BALANCE_SLOTS, COMPUTE=kinds["COMPUTE"], num_warps=4,
        )  # fmt: skip
    return out, balance, context, log_mass, choice, pull


def backward(
    grad: Tensor, grad_balance: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
    router: Tensor | None, alpha: Tensor, beta: Tensor, context: Tensor, log_mass: Tensor, choice: Tensor, pull: Tensor,
    rates: list[int], scaled: bool,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv in the layout of q, k, v, and the gradient of the router (H, R, D) where there is one."""
    batch, heads, length, dim = q.shape
    width, kinds, count = block_dim(dim), arithmetic(q.dtype), len(rates)
    block = triton.next_power_of_2(count)
    options = dict(dtype=state_dtype(q.dtype), device=q.device)
    config = QUERIES_BACKWARD[width]
    splits, chunk = split(length, config.rows, batch * heads)
    grad_q = torch.empty_like(q)
    grad_context = torch.empty(batch * heads, splits, block, width, width, **options)
    grad_mass = torch.empty(batch * heads, splits, block, width, **options)
    grad_router = torch.empty(batch, heads, splits, block, width, **options)
    queries_backward_kernel[(batch * heads * splits,)](
        q, *strides(q), grad, *strides(grad), *mask_arguments(key_mask, q), context if router is None else router,
        alpha, context, log_mass, choice, pull, grad_balance, grad_q, *strides(grad_q),
        grad_context, grad_mass, grad_router, length, heads, splits, chunk,
        R=count, BLOCK_R=block, ROUTED=router is not None, SCALED=scaled, HAS_MASK=key_mask is not None,
        HEAD_DIM=dim, BLOCK_N=config.rows, BLOCK_D=width, **kinds, **config.options,
    )  # fmt: skip
    merged, shift, _ = merge_gradients(grad_context, grad_mass, context, None, q.shape, q.dtype, count)
    grad_k, grad_v = keys_backward(k, v, key_mask, beta, log_mass, merged, shift, tuple(rates))
    if router is None:
        return [grad_q, grad_k, grad_v]
    return [grad_q, grad_k, grad_v, grad_router.sum((0, 2))[:, :count, :dim].contiguous().to(router.dtype)]
