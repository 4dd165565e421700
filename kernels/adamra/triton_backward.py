"""AdaMRA-R's gradients on the query side, one resolution after another.

With F_i = g_i A_i and r = r(i) chosen, dA_i = do_i C^rᵀ, and dC^r sums F_iᵀ do_i over the queries that chose r. A
program first lists the queries of its part by the resolution that they chose, and then gathers them list by list: a
tile meets one context, one scale and one log-mass, and only one gradient of a context is summed at a time. Rows of a
head are whole sectors of memory, so that a gather within a part costs no more than a walk.

The choice of padded queries is −1; they are listed with the first resolution, as the complement of their position.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false
# ruff: noqa: RUF005  (Triton's tuples grow by +; it knows no unpacking)

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adamra.triton_route import load_router, pick, shares_of_rows
from kernels.common.launch import COUNTS, Config
from kernels.common.tiles import gather_rows, halves, place, product, real_rows, scatter_rows, widened
from kernels.lln.triton import read_features, two_columns
from kernels.lln.triton_keys import ONES, keys_backward, keys_backward_kernel, keys_backward_launch
from kernels.lln.triton_merge import round_gradient

# By padded head dimension.
QUERIES_BACKWARD = {16: Config(64, 4, 5), 32: Config(64, 4, 5), 64: Config(64, 4, 2), 128: Config(32, 16, 1)}

LIST_BLOCK = 1024
"""Queries that a program lists at once."""

ROUTER_SLOTS = 2048
"""Numbers of slots that a program which finishes the router's gradient reads at once."""


@triton.jit
def split_columns(x, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr):
    """x (rows, COLUMNS), periodic in BLOCK_R columns, as an operand whose periods are: x rounded, the rest, x rounded.

    Times a matrix whose periods of rows are W rounded, W rounded, the rest of W, this is x W, nearly exactly.
    """
    period = tl.arange(0, COLUMNS)[None, :] // BLOCK_R
    rounded = x.to(OPERAND)
    rest = (x - rounded.to(COMPUTE)).to(OPERAND)
    zero = tl.zeros(x.shape, OPERAND)
    return tl.where(period == 1, rest, tl.where(period < 3, rounded, zero))


@triton.jit
def list_rows(choice_ptr, list_ptr, first, last, chunk, R: tl.constexpr, BLOCK: tl.constexpr):
    """Lists (R, chunk) of the rows first … last by the resolution they chose, in order, and the length of each list."""
    offset, counts = tl.arange(0, BLOCK), ()
    for _r in tl.static_range(R):
        counts = counts + (tl.full((), 0, tl.int32),)
    for start in range(first, last, BLOCK):
        row = start + offset
        choice = tl.load(choice_ptr + row, mask=row < last, other=R)
        entry = tl.where(choice < 0, -1 - row, row)
        longer = ()
        for r in tl.static_range(R):
            mine = (choice == r) if r > 0 else (choice <= 0)
            rank = tl.cumsum(mine.to(tl.int32), axis=0)
            tl.store(list_ptr + r * chunk + counts[r] + rank - 1, entry, mask=mine)
            longer = longer + (counts[r] + tl.sum(mine.to(tl.int32)),)
        counts = longer
    tl.debug_barrier()  # other threads read what these wrote
    return counts


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def queries_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    router_ptr, alpha_ptr, context_ptr, log_mass_ptr, choice_ptr, pull_ptr, grad_balance_ptr,
    grad_q_ptr, gq_b, gq_h, gq_n,
    list_ptr, grad_context_ptr, shift_ptr, grad_router_ptr,  # (B·H, splits, R, chunk), slots (B·H, R, splits, …)
    length, num_batches, num_heads, splits, chunk,
    R: tl.constexpr, BLOCK_R: tl.constexpr, ROUTED: tl.constexpr, SCALED: tl.constexpr, HAS_MASK: tl.constexpr,
    WHOLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one part of a head, and its share of the gradients of the summaries and of the router, (H, B, splits, …).

    A part that is WHOLE, the only one of its head, has no share but all: there is nothing left to merge.

    With dg_i = do_i · y_i the logits of the router get g_i (1[r = r(i)] − p_ir) dg_i from the gate and
    p_ir (b_r − Σ_s p_is b_s) from the balance loss, b = ∂ loss / ∂ p. The router's gradient is a float32 result, so
    contexts, the router and its share of each row enter their products with what rounding cut.
    """
    b, h, part = place(tl.program_id(0), num_heads, splits)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    q_ptr += b * q_b + wide_h * q_h
    grad_ptr += b * grad_b + wide_h * grad_h
    grad_q_ptr += b * gq_b + wide_h * gq_h
    mask_ptr += b * mask_b
    list_ptr += (head * splits + part) * R * chunk
    COLUMNS: tl.constexpr = max(16, 4 * BLOCK_R)
    offset_n, offset_d, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, COLUMNS)
    EXACT: tl.constexpr = ROUTED and SCALED and OPERAND != COMPUTE
    WIDE: tl.constexpr = 2 * BLOCK_D if EXACT else BLOCK_D
    wide, square = tl.arange(0, WIDE)[None, :], offset_d[:, None] * BLOCK_D + offset_d[None, :]
    first, last = part * chunk, tl.minimum((part + 1) * chunk, length)
    row = column % BLOCK_R
    if ROUTED:
        router_back, router = load_router(
            router_ptr + h * R * HEAD_DIM, R, BLOCK_R, COLUMNS, HEAD_DIM, BLOCK_D, COMPUTE, OPERAND
        )
        pulls = tl.load(pull_ptr + h * BLOCK_R + row, mask=row < R, other=0.0).to(COMPUTE)
        grad_balance = tl.load(grad_balance_ptr).to(COMPUTE)
        counts = list_rows(choice_ptr + head * length, list_ptr, first, last, chunk, R, BLOCK_L)
    grad_router = tl.zeros((COLUMNS, BLOCK_D), COMPUTE)
    for r in range(R):
        count = pick(r, counts[0], counts, R) if ROUTED else tl.where(h % R == r, last - first, 0)
        alpha = tl.load(alpha_ptr + r).to(COMPUTE)
        log_mass = tl.load(log_mass_ptr + (head * R + r) * 3 * BLOCK_D + offset_d)
        state = context_ptr + (head * R + r) * BLOCK_D * BLOCK_D
        context = tl.load(state + wide % BLOCK_D * BLOCK_D + offset_d[:, None])  # Cᵀ, with EXACT twice
        rounded = context.to(OPERAND)
        if EXACT:
            rounded = tl.where(wide < BLOCK_D, rounded, (context - rounded.to(COMPUTE)).to(OPERAND))
        grad_context, shift = tl.zeros((BLOCK_D, BLOCK_D), COMPUTE), tl.zeros((BLOCK_D, ONES), COMPUTE)
        for start in range(0, count, BLOCK_N):
            keep = start + offset_n < count
            if ROUTED:
                token = tl.load(list_ptr + r * chunk + start + offset_n, mask=keep, other=0)
                real = keep
                if HAS_MASK:
                    real = keep & (token >= 0)
                    token = tl.where(token < 0, -1 - token, token)
            else:
                token = first + start + offset_n
                real = real_rows(mask_ptr, mask_n, first + start, length, offset_n, HAS_MASK)
            narrow = gather_rows(q_ptr, q_n, token, real, HEAD_DIM, BLOCK_D)
            q = widened(narrow, BLOCK_D, COMPUTE, OPERAND, PRECISION)
            grad = gather_rows(grad_ptr, grad_n, token, real, HEAD_DIM, BLOCK_D)
            reading = product(grad, rounded, COMPUTE, OPERAND, PRECISION)
            if EXACT:
                left, right = halves(reading)
                reading = left + right
            features, inverse = read_features(q, alpha, log_mass[None, :], PRECISION)
            grad_gate = tl.sum(features * reading, axis=1) * inverse
            gate = tl.full((BLOCK_N,), 1.0, COMPUTE)
            if ROUTED:
                shares, largest = shares_of_rows(narrow, router, R, BLOCK_R, COLUMNS, COMPUTE, OPERAND, PRECISION)
                mean = tl.sum(shares * pulls[None, :], axis=1) * (BLOCK_R / COLUMNS)
                routing = shares * (pulls[None, :] - mean[:, None]) * grad_balance
                if SCALED:
                    gate = largest
                    chosen = tl.where(row == r, 1.0, 0.0)
                    routing += (gate * grad_gate)[:, None] * (chosen[None, :] - shares)
                routing = tl.where(real[:, None], routing, 0.0)
                routing = split_columns(routing, BLOCK_R, COLUMNS, COMPUTE, OPERAND)
            gated = features * (gate * inverse)[:, None]
            grad_q = gated * (reading * alpha - (alpha * grad_gate)[:, None])
            columns = tl.trans(gated.to(OPERAND))
            grad_context += product(columns, grad, COMPUTE, OPERAND, PRECISION)
            deltas = two_columns(-grad_gate, OPERAND, COMPUTE, BLOCK_N)
            shift += product(columns, deltas, COMPUTE, OPERAND, PRECISION)
            if ROUTED:
                grad_q += product(routing, router_back, COMPUTE, OPERAND, PRECISION)
                grad_router += product(tl.trans(routing), narrow, COMPUTE, OPERAND, PRECISION)
            scatter_rows(grad_q_ptr, gq_n, token, keep, grad_q, HEAD_DIM, BLOCK_D)
        shift = tl.sum(shift, axis=1)
        if WHOLE:
            context = tl.load(context_ptr + (head * R + r) * BLOCK_D * BLOCK_D + square)
            grad_context, shift = round_gradient(grad_context, shift, context, COMPUTE, OPERAND)
        slot = (head * R + r) * splits + part
        tl.store(grad_context_ptr + slot * BLOCK_D * BLOCK_D + square, grad_context)
        tl.store(shift_ptr + slot * BLOCK_D + offset_d, shift)
    if ROUTED:
        grad_router = tl.where((column < 2 * BLOCK_R)[:, None], grad_router, 0.0)
        grad_router = tl.sum(tl.reshape(grad_router, (COLUMNS // BLOCK_R, BLOCK_R, BLOCK_D)), axis=0)
        slot = ((wide_h * num_batches + b) * splits + part) * BLOCK_R + tl.arange(0, BLOCK_R)
        tl.store(grad_router_ptr + slot[:, None] * BLOCK_D + offset_d[None, :], grad_router)


@triton.jit
def router_gradient(
    slot_ptr, out_ptr, slots, resolution,  # (H, slots, R', D'), (H, R, D)
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Gradient of one head's router at one resolution, h · R + r, from the slots of all parts."""
    h, r = (resolution // R).to(tl.int64), resolution % R
    offset, offset_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK, BLOCK_D), COMPUTE)
    for first in range(0, slots, BLOCK):
        position = ((h * slots + first + offset[:, None]) * BLOCK_R + r) * BLOCK_D + offset_d[None, :]
        total += tl.load(slot_ptr + position, mask=(first + offset < slots)[:, None], other=0.0)
    out_ptr += (h * R + r) * HEAD_DIM + offset_d
    tl.store(out_ptr, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=offset_d < HEAD_DIM)


@triton.jit
def keys_and_router_backward_kernel(
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    share_ptr, share_r, share_b,
    beta_ptr, log_mass_ptr, grad_context_ptr, shift_ptr,
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    length, num_heads, splits, chunk,
    slot_ptr, grad_router_ptr, slots, programs,
    LEVELS: tl.constexpr, ORDER: tl.constexpr, R: tl.constexpr, PHASES: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`keys_backward_kernel` in so many programs; those after them finish the router's gradient."""
    pid = tl.program_id(0)
    if pid < programs:
        keys_backward_kernel(
            k_ptr, k_b, k_h, k_n, v_ptr, v_b, v_h, v_n, mask_ptr, mask_b, mask_n, share_ptr, share_r, share_b,
            beta_ptr, log_mass_ptr, grad_context_ptr, shift_ptr,
            grad_k_ptr, gk_b, gk_h, gk_n, grad_v_ptr, gv_b, gv_h, gv_n, length, num_heads, splits, chunk,
            LEVELS, ORDER, R, PHASES, HAS_MASK, HEAD_DIM, BLOCK_N, BLOCK_D, COMPUTE, OPERAND, PRECISION,
        )  # fmt: skip
    else:
        router_gradient(slot_ptr, grad_router_ptr, slots, pid - programs, R, BLOCK_R, BLOCK, HEAD_DIM, BLOCK_D, COMPUTE)


def keys_and_router_backward(
    k: Tensor, v: Tensor, key_mask: Tensor | None, beta: Tensor, log_mass: Tensor, grad_context: Tensor, shift: Tensor,
    rates: tuple[int, ...], grad_router: Tensor, router: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """dk and dv, and, in the same launch, the gradient of the router (H, R, D), where there is one, from its slots."""
    inputs = (k, v, key_mask, beta, log_mass, grad_context, shift, rates)
    if router is None:
        return list(keys_backward(*inputs))
    grads, programs, arguments, options = keys_backward_launch(*inputs)
    heads, count, _ = router.shape
    slots, block, width = grad_router.shape[1:]
    grad_weights = torch.empty_like(router)
    keys_and_router_backward_kernel[(programs + heads * count,)](
        *arguments, grad_router, grad_weights, slots, programs, BLOCK_R=block, BLOCK=ROUTER_SLOTS // width, **options
    )
    return [*grads, grad_weights]
