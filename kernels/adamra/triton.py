"""AdaMRA-R in Triton: the query side, where every query reads the resolution it chose. The key side is LLN's.

    o_i = g_i Σ_l A_il C^r_l,   A_i = softmax_l(α_r q_il + λ^r_l),   r = r(i) = argmax_s w_s · q_i

All products with the R contexts run densely, and a row keeps the one that it chose: the tensor cores have time for it,
and neither queries nor outputs are moved. Only the chosen resolution is exponentiated.

Floor, in touches of one (B, H, N, D) tensor: moments 2, keys 2, queries 2, backward 3 and 4, in all 13. The choice is
saved as one byte a query, so that forward and backward cannot disagree about it.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false
# ruff: noqa: RUF005  (Triton's tuples grow by +; it knows no unpacking)

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import Config, arithmetic, block_dim, mask_arguments, split, state_dtype, strides
from kernels.common.tiles import exponential, load_rows, place, product, real_rows, store_rows, widened
from kernels.lln.triton import read_features, two_columns
from kernels.lln.triton_keys import ONES, WIDEST_HELD, keys_backward, merge_gradients, summarise

# By padded head dimension.
QUERIES = {16: Config(64, 4, 3), 32: Config(64, 4, 3), 64: Config(128, 8, 2), 128: Config(64, 8, 1)}
QUERIES_BACKWARD = {16: Config(64, 4, 2), 32: Config(64, 4, 2), 64: Config(64, 8, 1), 128: Config(32, 16, 1)}

BALANCE_SLOTS = 256
"""Partials that the finishing program reads at once."""


@triton.jit
def load_vectors(ptr, step, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):
    """R vectors of WIDTH numbers, `step` apart."""
    offset_d = tl.arange(0, BLOCK_D)
    vectors = ()
    for r in tl.static_range(R):
        vector = tl.load(ptr + r * step + offset_d, mask=offset_d < WIDTH, other=0.0)
        vectors = vectors + (vector.to(COMPUTE),)
    return vectors


@triton.jit
def load_scalars(ptr, R: tl.constexpr, COMPUTE: tl.constexpr):
    scalars = ()
    for r in tl.static_range(R):
        scalars = scalars + (tl.load(ptr + r).to(COMPUTE),)
    return scalars


@triton.jit
def pick(choice, first, values, R: tl.constexpr):
    """values[choice] by row, where `first` is values[0] in the shape of the result."""
    picked = first
    for r in tl.static_range(1, R):
        picked = tl.where(choice == r, values[r], picked)
    return picked


@triton.jit
def route(q, router, R: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """The chosen resolution of every row, lowest index at a tie, and softmax(W q), one column a resolution."""
    logits = ()
    for r in tl.static_range(R):
        logits = logits + (tl.sum(q * router[r][None, :], axis=1),)
    highest, choice = logits[0], tl.zeros((BLOCK_N,), tl.int32)
    for r in tl.static_range(1, R):
        choice = tl.where(logits[r] > highest, r, choice)
        highest = tl.maximum(highest, logits[r])
    total, weights = tl.zeros((BLOCK_N,), COMPUTE), ()
    for r in tl.static_range(R):
        weights = weights + (exponential(logits[r], highest, PRECISION),)
        total += weights[r]
    inverse, shares = 1.0 / total, ()
    for r in tl.static_range(R):
        shares = shares + (weights[r] * inverse,)
    return choice, shares


@triton.jit
def load_contexts(context_ptr, R: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr):
    """The context of every resolution as an operand, and what its rounding cut."""
    offset_d = tl.arange(0, BLOCK_D)
    contexts, rests = (), ()
    for r in tl.static_range(R):
        context = tl.load(context_ptr + (r * BLOCK_D + offset_d[:, None]) * BLOCK_D + offset_d[None, :])
        rounded = context.to(OPERAND)
        contexts = contexts + (rounded,)
        rests = rests + ((context - rounded.to(context.dtype)).to(OPERAND),)
    return contexts, rests


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
    if ROUTED:
        router = load_vectors(router_ptr + h * R * HEAD_DIM, HEAD_DIM, R, HEAD_DIM, BLOCK_D, COMPUTE)
    alphas = load_scalars(alpha_ptr, R, COMPUTE)
    log_masses = load_vectors(log_mass_ptr + head * R * 3 * BLOCK_D, 3 * BLOCK_D, R, BLOCK_D, BLOCK_D, COMPUTE)
    context_ptr += head * R * BLOCK_D * BLOCK_D
    if BLOCK_D <= WIDEST_HELD:
        contexts, _ = load_contexts(context_ptr, R, BLOCK_D, OPERAND)
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
            tl.store(choice_ptr + head * length + start + offset_n, choice.to(tl.uint8), mask=keep)
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
            contexts, _ = load_contexts(context_ptr, R, BLOCK_D, OPERAND)
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
        slot = ((wide_h * num_batches + b) * splits + part) * BLOCK_R + offset_r
        tl.store(count_ptr + slot, count)
        tl.store(probability_ptr + slot, probability)


@triton.jit
def balance_kernel(
    count_ptr, probability_ptr, balance_ptr, pull_ptr, slots, num_heads,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Balance loss R Σ_r f_r P_r, averaged over heads, and its derivative by each probability p_ir, `pull` (H, R').

    In float64: it is one number, and the sum of all probabilities.
    """
    offset, offset_r = tl.arange(0, BLOCK), tl.arange(0, BLOCK_R)
    balance = tl.zeros((BLOCK_R,), tl.float64)
    for h in range(num_heads):
        counts, probabilities = tl.zeros((BLOCK, BLOCK_R), tl.float64), tl.zeros((BLOCK, BLOCK_R), tl.float64)
        for first in range(0, slots, BLOCK):
            position = (tl.cast(h, tl.int64) * slots + first + offset[:, None]) * BLOCK_R + offset_r[None, :]
            inside = (first + offset < slots)[:, None]
            counts += tl.load(count_ptr + position, mask=inside, other=0.0)
            probabilities += tl.load(probability_ptr + position, mask=inside, other=0.0)
        count = tl.sum(counts, axis=0)
        total = tl.maximum(tl.sum(count), 1.0)
        pull = count / total * (R / total) / num_heads
        balance += pull * tl.where(offset_r < R, tl.sum(probabilities, axis=0), 0.0)
        tl.store(pull_ptr + h * BLOCK_R + offset_r, pull.to(COMPUTE))
    tl.store(balance_ptr, tl.sum(balance).to(COMPUTE))


@triton.jit
def gradient_reading(
    grad, context, rest, EXACT: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """do Cᵀ, with EXACT nearly as exact as fp32: with the product of what rounding the context cut."""
    reading = product(grad, tl.trans(context), COMPUTE, OPERAND, PRECISION)
    if EXACT and OPERAND != COMPUTE:
        reading += product(grad, tl.trans(rest), COMPUTE, OPERAND, PRECISION)
    return reading


@triton.jit
def queries_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    router_ptr, alpha_ptr, context_ptr, log_mass_ptr, choice_ptr, pull_ptr, grad_balance_ptr,
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_context_ptr, shift_ptr, grad_router_ptr,  # slots (B·H, R, splits, …), (H, B, splits, R', D')
    length, num_batches, num_heads, splits, chunk,
    R: tl.constexpr, BLOCK_R: tl.constexpr, ROUTED: tl.constexpr, SCALED: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one part of a head, and its share of the gradients of the summaries and of the router.

    With y_i the chosen read: dg_i = do_i · y_i, and the logits of the router get g_i (1[r = r(i)] − p_ir) dg_i from
    the gate and p_ir (b_r − Σ_s p_is b_s) from the balance loss, b = ∂ loss / ∂ p. The router's gradient is a float32
    result, so contexts and the router's share of each row enter their products with what rounding cut.
    """
    b, h, part = place(tl.program_id(0), num_heads, splits)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    q_ptr += b * q_b + wide_h * q_h
    grad_ptr += b * grad_b + wide_h * grad_h
    grad_q_ptr += b * gq_b + wide_h * gq_h
    mask_ptr += b * mask_b
    if ROUTED:
        router = load_vectors(router_ptr + h * R * HEAD_DIM, HEAD_DIM, R, HEAD_DIM, BLOCK_D, COMPUTE)
        pulls = load_scalars(pull_ptr + h * BLOCK_R, R, COMPUTE)
    alphas = load_scalars(alpha_ptr, R, COMPUTE)
    log_masses = load_vectors(log_mass_ptr + head * R * 3 * BLOCK_D, 3 * BLOCK_D, R, BLOCK_D, BLOCK_D, COMPUTE)
    context_ptr += head * R * BLOCK_D * BLOCK_D
    if BLOCK_D <= WIDEST_HELD:
        contexts, rests = load_contexts(context_ptr, R, BLOCK_D, OPERAND)
    offset_n, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    EXACT: tl.constexpr = ROUTED and SCALED
    COLUMNS: tl.constexpr = max(16, 2 * BLOCK_R)
    column = tl.arange(0, COLUMNS)[None, :]
    if ROUTED:
        grad_balance = tl.load(grad_balance_ptr).to(COMPUTE)
    grad_contexts, shifts = (), ()
    for _r in tl.static_range(R):
        grad_contexts = grad_contexts + (tl.zeros((BLOCK_D, BLOCK_D), COMPUTE),)
        shifts = shifts + (tl.zeros((BLOCK_D, ONES), COMPUTE),)
    grad_router = tl.zeros((COLUMNS, BLOCK_D), COMPUTE)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        keep = start + offset_n < length
        narrow = load_rows(q_ptr, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        q = widened(narrow, BLOCK_D, COMPUTE, OPERAND, PRECISION)
        grad = load_rows(grad_ptr, grad_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        gate = tl.full((BLOCK_N,), 1.0, COMPUTE)
        choice = tl.zeros((BLOCK_N,), tl.int32) + h % R
        if ROUTED:
            choice = tl.load(choice_ptr + head * length + start + offset_n, mask=keep, other=0).to(tl.int32)
            _, shares = route(q, router, R, BLOCK_N, COMPUTE, PRECISION)
            if SCALED:
                gate = pick(choice, shares[0], shares, R)
        alpha = pick(choice, tl.full((BLOCK_N,), 1.0, COMPUTE) * alphas[0], alphas, R)
        log_mass = tl.broadcast_to(log_masses[0][None, :], (BLOCK_N, BLOCK_D))
        for r in tl.static_range(1, R):
            log_mass = tl.where((choice == r)[:, None], log_masses[r][None, :], log_mass)
        features, inverse = read_features(q, alpha[:, None], log_mass, PRECISION)
        if BLOCK_D > WIDEST_HELD:
            contexts, rests = load_contexts(context_ptr, R, BLOCK_D, OPERAND)
        reading = gradient_reading(grad, contexts[0], rests[0], EXACT, COMPUTE, OPERAND, PRECISION)
        for r in tl.static_range(1, R):
            dense = gradient_reading(grad, contexts[r], rests[r], EXACT, COMPUTE, OPERAND, PRECISION)
            reading = tl.where((choice == r)[:, None], dense, reading)
        grad_gate = tl.sum(features * reading, axis=1) * inverse
        gated = features * (gate * inverse)[:, None]
        grad_q = gated * (reading * alpha[:, None] - (alpha * grad_gate)[:, None])

        gated = gated.to(OPERAND)
        deltas = two_columns(-grad_gate, OPERAND, COMPUTE, BLOCK_N)
        new_contexts, new_shifts = (), ()
        for r in tl.static_range(R):
            mine = tl.trans(tl.where((choice == r)[:, None], gated, tl.zeros((BLOCK_N, BLOCK_D), OPERAND)))
            context = grad_contexts[r] + product(mine, grad, COMPUTE, OPERAND, PRECISION)
            new_contexts = new_contexts + (context,)
            new_shifts = new_shifts + (shifts[r] + product(mine, deltas, COMPUTE, OPERAND, PRECISION),)
        grad_contexts, shifts = new_contexts, new_shifts
        if ROUTED:
            mean = tl.zeros((BLOCK_N,), COMPUTE)
            for r in tl.static_range(R):
                mean += shares[r] * pulls[r]
            columns = tl.zeros((BLOCK_N, COLUMNS), OPERAND)
            for r in tl.static_range(R):
                routing = shares[r] * (pulls[r] - mean) * grad_balance
                if SCALED:
                    routing += gate * grad_gate * (tl.where(choice == r, 1.0, 0.0) - shares[r])
                routing = tl.where(real, routing, 0.0)
                grad_q += routing[:, None] * router[r][None, :]
                rounded = routing.to(OPERAND)
                rest = (routing - rounded.to(COMPUTE)).to(OPERAND)
                columns = tl.where(column == r, rounded[:, None], columns)
                columns = tl.where(column == BLOCK_R + r, rest[:, None], columns)
            grad_router += product(tl.trans(columns), narrow, COMPUTE, OPERAND, PRECISION)
        store_rows(grad_q_ptr, gq_n, start, offset_n, keep, grad_q, HEAD_DIM, BLOCK_D)
    square = offset_d[:, None] * BLOCK_D + offset_d[None, :]
    for r in tl.static_range(R):
        slot = (head * R + r) * splits + part
        tl.store(grad_context_ptr + slot * BLOCK_D * BLOCK_D + square, grad_contexts[r])
        tl.store(shift_ptr + slot * BLOCK_D + offset_d, tl.sum(shifts[r], axis=1))
    if ROUTED:
        grad_router = tl.sum(tl.reshape(grad_router, (COLUMNS // BLOCK_R, BLOCK_R, BLOCK_D)), axis=0)
        slot = (wide_h * num_batches + b) * splits + part
        rows = tl.arange(0, BLOCK_R)[:, None] * BLOCK_D + offset_d[None, :]
        tl.store(grad_router_ptr + slot * BLOCK_R * BLOCK_D + rows, grad_router)


@triton.jit
def router_gradient_kernel(
    slot_ptr, out_ptr, slots,  # (H, slots, R', D'), (H, R, D)
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Gradient of one row of a head's router from the slots of all parts."""
    h, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset, offset_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK, BLOCK_D), COMPUTE)
    for first in range(0, slots, BLOCK):
        position = ((h * slots + first + offset[:, None]) * BLOCK_R + r) * BLOCK_D + offset_d[None, :]
        total += tl.load(slot_ptr + position, mask=(first + offset < slots)[:, None], other=0.0)
    out_ptr += (h * R + r) * HEAD_DIM + offset_d
    tl.store(out_ptr, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=offset_d < HEAD_DIM)


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
    grad_context = torch.empty(batch * heads * count, splits, width, width, **options)
    shift = torch.empty(batch * heads * count, splits, width, **options)
    grad_router = torch.empty(heads, batch * splits, block, width, **options)
    queries_backward_kernel[(batch * heads * splits,)](
        q, *strides(q), grad, *strides(grad), *mask_arguments(key_mask, q), context if router is None else router,
        alpha, context, log_mass, choice, pull, grad_balance, grad_q, *strides(grad_q),
        grad_context, shift, grad_router, length, batch, heads, splits, chunk,
        R=count, BLOCK_R=block, ROUTED=router is not None, SCALED=scaled, HAS_MASK=key_mask is not None,
        HEAD_DIM=dim, BLOCK_N=config.rows, BLOCK_D=width, **kinds, **config.options,
    )  # fmt: skip
    merged, shift, _ = merge_gradients(grad_context, shift, context, None, q.shape, q.dtype)
    grad_k, grad_v = keys_backward(k, v, key_mask, beta, log_mass, merged, shift, tuple(rates))
    if router is None:
        return [grad_q, grad_k, grad_v]
    grad_weights = torch.empty_like(router)
    router_gradient_kernel[(heads, count)](
        grad_router, grad_weights, batch * splits,
        R=count, BLOCK_R=block, BLOCK=2 * BALANCE_SLOTS // width, HEAD_DIM=dim, BLOCK_D=width,
        COMPUTE=kinds["COMPUTE"], num_warps=4,
    )  # fmt: skip
    return [grad_q, grad_k, grad_v, grad_weights]
