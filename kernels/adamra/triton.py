"""AdaMRA-R in Triton: the query side, where every query reads the resolution it chose. The key side is LLN's.

    o_i = g_i Σ_l A_il C^r_l,   A_i = softmax_l(α_r q_il + λ^r_l),   r = r(i) = argmax_s w_s · q_i

All products with the R contexts run densely, and a row keeps the one that it chose: the tensor cores have time for it,
and neither queries nor outputs are moved. Only the chosen resolution is exponentiated.

Floor, in touches of one (B, H, N, D) tensor: moments 2, keys 2, queries 2, backward 3 and 4, in all 13. The choice is
saved, so that forward and backward cannot disagree about it: as four bytes a query, and −1 for a padded one.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false
# ruff: noqa: RUF005  (Triton's tuples grow by +; it knows no unpacking)

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adamra.triton_backward import (
    LIST_BLOCK,
    QUERIES_BACKWARD,
    keys_and_router_backward,
    queries_backward_kernel,
)
from kernels.adamra.triton_route import load_scalars, load_vectors, pick, route
from kernels.common.launch import COUNTS, Config, arithmetic, block_dim, mask_arguments, split, state_dtype, strides
from kernels.common.tiles import load_rows, place, product, real_rows, store_rows, widened
from kernels.lln.triton import read_features
from kernels.lln.triton_keys import WIDEST_HELD, summarise_parts
from kernels.lln.triton_merge import load_parts, merge_gradients, merge_parts, merge_summaries

# By padded head dimension.
QUERIES = {16: Config(64, 4, 3), 32: Config(64, 4, 3), 64: Config(64, 4, 2, 168), 128: Config(64, 8, 1)}

PROGRAMS = 264
"""As `kernels.common.launch.PROGRAMS`, for the passes over queries, whose registers let two run side by side."""

WIDEST_WHOLE = 32
"""Widest head whose summaries, all at once, the registers of one program hold."""

BALANCE_SLOTS = 4096
"""Partials that the finishing program reads at once."""


@triton.jit
def load_contexts(context_ptr, R: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr):
    """The context of every resolution as an operand."""
    offset_d, contexts = tl.arange(0, BLOCK_D), ()
    for r in tl.static_range(R):
        context = tl.load(context_ptr + (r * BLOCK_D + offset_d[:, None]) * BLOCK_D + offset_d[None, :])
        contexts = contexts + (context.to(OPERAND),)
    return contexts


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def queries_kernel(
    q_ptr, q_b, q_h, q_n,
    mask_ptr, mask_b, mask_n,
    router_ptr, alpha_ptr, context_ptr, log_mass_ptr,  # (H, R, D), (R,), (B·H, R, …)
    out_ptr, out_b, out_h, out_n,
    choice_ptr, count_ptr, probability_ptr,  # (B·H, N), slots (B, splits, H, R')
    peak_slot_ptr, mass_slot_ptr, context_slot_ptr,  # as in `load_parts`
    length, num_heads, splits, chunk, key_splits,
    R: tl.constexpr, BLOCK_R: tl.constexpr, ROUTED: tl.constexpr, SCALED: tl.constexpr, HAS_MASK: tl.constexpr,
    WHOLE: tl.constexpr, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of one part of a head, and what the balance loss needs of it.

    A part that is WHOLE, the only one of its head, also merges the head's summaries.
    """
    b, h, part = place(tl.program_id(0), num_heads, splits)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    q_ptr += b * q_b + wide_h * q_h
    out_ptr += b * out_b + wide_h * out_h
    mask_ptr += b * mask_b
    if ROUTED:
        router = load_vectors(router_ptr + h * R * HEAD_DIM, HEAD_DIM, R, HEAD_DIM, BLOCK_D, COMPUTE)
    alphas = load_scalars(alpha_ptr, R, COMPUTE)
    if WHOLE:  # everything is loaded before anything is stored: resolutions wait for memory together
        row, parts = tl.arange(0, BLOCK_D), ()
        for r in tl.static_range(R):
            slots = load_parts(
                peak_slot_ptr, mass_slot_ptr, context_slot_ptr, head * R + r, key_splits, row, PARTS, BLOCK_D
            )
            parts = parts + (slots,)
        for r in tl.static_range(R):
            merge_parts(parts[r], context_ptr, log_mass_ptr, head * R + r, row, PARTS, HEAD_DIM, BLOCK_D)
        tl.debug_barrier()  # other threads read what these wrote
    log_masses = load_vectors(log_mass_ptr + head * R * 3 * BLOCK_D, 3 * BLOCK_D, R, BLOCK_D, BLOCK_D, COMPUTE)
    context_ptr += head * R * BLOCK_D * BLOCK_D
    if BLOCK_D <= WIDEST_HELD:
        contexts = load_contexts(context_ptr, R, BLOCK_D, OPERAND)
    offset_n, offset_r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    counts, probabilities = (), ()
    for _r in tl.static_range(R):
        counts = counts + (tl.zeros((BLOCK_N,), COMPUTE),)
        probabilities = probabilities + (tl.zeros((BLOCK_N,), COMPUTE),)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        keep = start + offset_n < length
        q = load_rows(q_ptr, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        q = widened(q, BLOCK_D, COMPUTE, OPERAND, PRECISION)
        gate = tl.full((BLOCK_N,), 1.0, COMPUTE)
        choice = tl.zeros((BLOCK_N,), tl.int32) + h % R
        if ROUTED:
            choice, shares = route(q, router, R, BLOCK_N, COMPUTE, PRECISION)
            tl.store(choice_ptr + head * length + start + offset_n, tl.where(real, choice, -1), mask=keep)
            new_counts, new_probabilities = (), ()
            for r in tl.static_range(R):
                new_counts = new_counts + (counts[r] + tl.where(real & (choice == r), 1.0, 0.0),)
                new_probabilities = new_probabilities + (probabilities[r] + tl.where(real, shares[r], 0.0),)
            counts, probabilities = new_counts, new_probabilities
            if SCALED:
                gate = pick(choice, shares[0], shares, R)
        alpha = pick(choice, tl.full((BLOCK_N,), 1.0, COMPUTE) * alphas[0], alphas, R)
        log_mass = tl.broadcast_to(log_masses[0][None, :], (BLOCK_N, BLOCK_D))
        for r in tl.static_range(1, R):
            log_mass = tl.where((choice == r)[:, None], log_masses[r][None, :], log_mass)
        features, inverse = read_features(q, alpha[:, None], log_mass, PRECISION)
        features = features.to(OPERAND)
        if BLOCK_D > WIDEST_HELD:
            contexts = load_contexts(context_ptr, R, BLOCK_D, OPERAND)
        out = product(features, contexts[0], COMPUTE, OPERAND, PRECISION)
        for r in tl.static_range(1, R):
            dense = product(features, contexts[r], COMPUTE, OPERAND, PRECISION)
            out = tl.where((choice == r)[:, None], dense, out)
        out *= (gate * inverse)[:, None]
        if HAS_MASK:
            out = tl.where(real[:, None], out, 0.0)
        store_rows(out_ptr, out_n, start, offset_n, keep, out, HEAD_DIM, BLOCK_D)
    if ROUTED:
        count, probability = tl.zeros((BLOCK_R,), COMPUTE), tl.zeros((BLOCK_R,), COMPUTE)
        for r in tl.static_range(R):
            count = tl.where(offset_r == r, tl.sum(counts[r]), count)
            probability = tl.where(offset_r == r, tl.sum(probabilities[r]), probability)
        slot = ((b * splits + part) * num_heads + h) * BLOCK_R + offset_r
        tl.store(count_ptr + slot, count)
        tl.store(probability_ptr + slot, probability)


@triton.jit
def balance_kernel(
    count_ptr, probability_ptr, balance_ptr, pull_ptr, slots, num_heads,  # slots (slots, H, R')
    WEIGHT: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """WEIGHT R Σ_r f_r P_r, averaged over heads, and its derivative by each probability p_ir, `pull` (H, R').

    All heads have the same real queries, so that one sum of all counts normalises f and P. In float64: it is one
    number, and the sum of all probabilities.
    """
    offset, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)
    width = num_heads * BLOCK_R
    counts, probabilities = tl.zeros((BLOCK, WIDTH), tl.float64), tl.zeros((BLOCK, WIDTH), tl.float64)
    for first in range(0, slots, BLOCK):
        inside = (first + offset < slots) & (column < width)[None, :]
        position = (first + offset) * width + column[None, :]
        counts += tl.load(count_ptr + position, mask=inside, other=0.0)
        probabilities += tl.load(probability_ptr + position, mask=inside, other=0.0)
    count, probability = tl.sum(counts, axis=0), tl.sum(probabilities, axis=0)
    total = tl.maximum(tl.sum(count), 1.0)  # num_heads times the real queries
    pull = count * (tl.full((), WEIGHT, tl.float64) * R * num_heads / (total * total))
    tl.store(pull_ptr + column, pull.to(COMPUTE), mask=column < width)
    tl.store(balance_ptr, tl.sum(pull * probability).to(COMPUTE))


# ------------------------------------------------------------------------------------------------------------ launches


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, router: Tensor | None, alpha: Tensor, beta: Tensor,
    rates: list[int], scaled: bool, balance_weight: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output (B, H, N, D), laid out as (B, N, H, D), weighted balance loss, then what the backward pass reads.

    router   (H, R, D) contiguous; None: head h reads resolution h mod R
    scaled   whether the output is multiplied by the chosen probability
    """
    batch, heads, length, dim = q.shape
    width, kinds, count = block_dim(dim), arithmetic(q.dtype), len(rates)
    block = triton.next_power_of_2(count)
    options = dict(dtype=state_dtype(q.dtype), device=q.device)
    config = QUERIES[width]
    splits, chunk = split(length, config.rows, batch * heads, PROGRAMS)
    whole = splits == 1 and width <= WIDEST_WHOLE
    slots = summarise_parts(k, v, key_mask, beta, tuple(rates))
    key_splits = slots.peak.shape[1]
    if whole:
        context, log_mass = slots.merged()
    else:
        context, log_mass = merge_summaries(slots, dim)
        slots = None  # its memory is free for the output
    out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    choice = torch.empty(batch * heads, length, dtype=torch.int32, device=q.device)
    counts, probabilities = (torch.empty(batch * splits, heads, block, **options) for _ in range(2))
    queries_kernel[(batch * heads * splits,)](
        q, *strides(q), *mask_arguments(key_mask, q), context if router is None else router,
        alpha, context, log_mass, out, *strides(out), choice, counts, probabilities,
        *(slots or (context,) * 3), length, heads, splits, chunk, key_splits,
        R=count, BLOCK_R=block, ROUTED=router is not None, SCALED=scaled, HAS_MASK=key_mask is not None,
        WHOLE=whole, PARTS=triton.next_power_of_2(key_splits) if whole else 1,
        HEAD_DIM=dim, BLOCK_N=config.rows, BLOCK_D=width, **kinds, **config.options,
    )  # fmt: skip
    if router is None:
        balance, pull = torch.zeros((), **options), torch.zeros(heads, block, **options)
    else:
        balance, pull = torch.empty((), **options), torch.empty(heads, block, **options)
        columns = triton.next_power_of_2(heads * block)
        balance_kernel[(1,)](
            counts, probabilities, balance, pull, batch * splits, heads,
            WEIGHT=balance_weight, R=count, BLOCK_R=block, WIDTH=columns,
            BLOCK=max(1, min(BALANCE_SLOTS // columns, triton.next_power_of_2(batch * splits))),
            COMPUTE=kinds["COMPUTE"], num_warps=4,
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
    splits, chunk = split(length, config.rows, batch * heads, PROGRAMS)
    grad_q = torch.empty_like(q)
    grad_context = torch.empty(batch * heads * count, splits, width, width, **options)
    shift = torch.empty(batch * heads * count, splits, width, **options)
    grad_router = torch.empty(heads, batch * splits, block, width, **options)
    rows = torch.empty(batch * heads, splits, count, chunk, dtype=torch.int32, device=q.device)
    queries_backward_kernel[(batch * heads * splits,)](
        q, *strides(q), grad, *strides(grad), *mask_arguments(key_mask, q), context if router is None else router,
        alpha, context, log_mass, choice, pull, grad_balance, grad_q, *strides(grad_q),
        rows, grad_context, shift, grad_router, length, batch, heads, splits, chunk,
        R=count, BLOCK_R=block, ROUTED=router is not None, SCALED=scaled, HAS_MASK=key_mask is not None,
        WHOLE=splits == 1, HEAD_DIM=dim, BLOCK_N=config.rows, BLOCK_D=width,
        BLOCK_L=min(LIST_BLOCK, triton.next_power_of_2(chunk)), **kinds, **config.options,
    )  # fmt: skip
    if splits > 1:
        grad_context, shift, _ = merge_gradients(grad_context, shift, context, None, q.shape, q.dtype)
    inputs = (k, v, key_mask, beta, log_mass, grad_context, shift, tuple(rates))
    return [grad_q, *keys_and_router_backward(*inputs, grad_router, router)]
