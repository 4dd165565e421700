"""AdaMRA-R's gradients on the query side.

With F_i = g_i A_i and r = r(i) chosen, dA_i = do_i C^rᵀ, and dC^r sums F_iᵀ do_i over the queries that chose r. A tile
of do is loaded once for each resolution, side by side, (rows, R' · D), with the rows of all others left out. These are
not fetched, so that it costs nothing. Both products then run over all resolutions at once, into one accumulator each
and without a select:

    dA = [do | do | …] · [C⁰ᵀ; C¹ᵀ; …]        [dC⁰ᵀ; dC¹ᵀ; …] = [do | do | …]ᵀ F

The choice of padded queries is −1, so that it also serves as the mask.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false
# ruff: noqa: RUF005  (Triton's tuples grow by +; it knows no unpacking)

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adamra.triton_route import load_scalars, load_vectors, pick, route
from kernels.common.launch import Config, arithmetic
from kernels.common.tiles import load_rows, place, product, real_rows, store_rows, widened
from kernels.lln.triton import read_features
from kernels.lln.triton_keys import WIDEST_HELD, merge_gradients, merge_gradients_kernel, row_block

# By padded head dimension.
QUERIES_BACKWARD = {16: Config(64, 4, 5), 32: Config(64, 4, 5), 64: Config(64, 4, 2), 128: Config(32, 16, 1)}

WIDEST_STACKED = 128
"""Bytes of a row of operands up to which all contexts are held side by side; wider ones are loaded by turns."""

ROUTER_SLOTS = 2048
"""Numbers that a program which finishes the router's gradient reads at once."""


@triton.jit
def split_columns(x, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr):
    """x (rows, COLUMNS), periodic in BLOCK_R columns, as an operand: rounded, then what rounding cut, then zeros."""
    column = tl.arange(0, COLUMNS)[None, :]
    rounded = x.to(OPERAND)
    rest = (x - rounded.to(COMPUTE)).to(OPERAND)
    zero = tl.zeros(x.shape, OPERAND)
    return tl.where(column < BLOCK_R, rounded, tl.where(column < 2 * BLOCK_R, rest, zero))


@triton.jit
def load_stacked(
    ptr, stride_n, start, offset_n, choice, real, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of a head once for each resolution, side by side (rows, R' · D'), zero where a row chose another one."""
    column = tl.arange(0, BLOCK_R * BLOCK_D)
    resolution, offset_d = column // BLOCK_D, column % BLOCK_D
    position = ptr + tl.cast(start, tl.int64) * stride_n + (offset_n[:, None] * stride_n + offset_d[None, :])
    keep = real[:, None] & (choice[:, None] == resolution[None, :])
    if HEAD_DIM == BLOCK_D:
        return tl.load(position, mask=keep, other=0.0)
    else:
        return tl.load(position, mask=keep & (offset_d < HEAD_DIM)[None, :], other=0.0)


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
    STACKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one part of a head, and its share of the gradients of the summaries and of the router.

    With dg_i = do_i · y_i the logits of the router get g_i (1[r = r(i)] − p_ir) dg_i from the gate and
    p_ir (b_r − Σ_s p_is b_s) from the balance loss, b = ∂ loss / ∂ p. The router's gradient is a float32 result, so
    contexts and the router's share of each row enter their products with what rounding cut.
    """
    b, h, part = place(tl.program_id(0), num_heads, splits)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    q_ptr += b * q_b + wide_h * q_h
    grad_ptr += b * grad_b + wide_h * grad_h
    grad_q_ptr += b * gq_b + wide_h * gq_h
    mask_ptr += b * mask_b
    COLUMNS: tl.constexpr = max(16, 2 * BLOCK_R)
    STACK: tl.constexpr = BLOCK_R * BLOCK_D
    EXACT: tl.constexpr = ROUTED and SCALED and OPERAND != COMPUTE
    offset_n, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    column, stacked = tl.arange(0, COLUMNS), tl.arange(0, STACK)
    alphas = load_scalars(alpha_ptr, R, COMPUTE)
    log_mass_ptr += head * R * 3 * BLOCK_D
    router_ptr += h * R * HEAD_DIM
    HELD: tl.constexpr = BLOCK_D < WIDEST_HELD  # or loaded with every tile
    if HELD:
        log_masses = load_vectors(log_mass_ptr, 3 * BLOCK_D, R, BLOCK_D, BLOCK_D, COMPUTE)
    # [C⁰ᵀ; C¹ᵀ; …], row r · D + d, column l
    transposed = (stacked[:, None] // BLOCK_D * BLOCK_D + offset_d[None, :]) * BLOCK_D + stacked[:, None] % BLOCK_D
    exists = stacked[:, None] < R * BLOCK_D
    state = head * R * BLOCK_D * BLOCK_D
    square = offset_d[:, None] * BLOCK_D + offset_d[None, :]
    if STACKED:
        context = tl.load(context_ptr + state + transposed, mask=exists, other=0.0)
        rounded = context.to(OPERAND)
        rest = (context - rounded.to(COMPUTE)).to(OPERAND)
    if ROUTED:
        if HELD:
            router = load_vectors(router_ptr, HEAD_DIM, R, HEAD_DIM, BLOCK_D, COMPUTE)
        pulls = load_scalars(pull_ptr + h * BLOCK_R, R, COMPUTE)
        grad_balance = tl.load(grad_balance_ptr).to(COMPUTE)
        row = column % BLOCK_R
        inside = (row < R)[:, None] & (offset_d < HEAD_DIM)[None, :]
        weights = router_ptr + row[:, None] * HEAD_DIM + offset_d[None, :]
        weights = tl.load(weights, mask=inside, other=0.0).to(COMPUTE)
        weights_rounded = weights.to(OPERAND)
        weights_rest = (weights - weights_rounded.to(COMPUTE)).to(OPERAND)
        choice_ptr += head * length
    if STACKED:
        grad_context = tl.zeros((STACK, BLOCK_D), COMPUTE)
    else:
        grad_contexts = ()
        for _r in tl.static_range(R):
            grad_contexts = grad_contexts + (tl.zeros((BLOCK_D, BLOCK_D), COMPUTE),)
    shift, grad_router = tl.zeros((COLUMNS, BLOCK_D), COMPUTE), tl.zeros((COLUMNS, BLOCK_D), COMPUTE)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        keep = start + offset_n < length
        if ROUTED:
            choice = tl.load(choice_ptr + start + offset_n, mask=keep, other=-1)
            real = (choice >= 0) if HAS_MASK else keep
        else:
            choice = tl.zeros((BLOCK_N,), tl.int32) + h % R
            real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        narrow = load_rows(q_ptr, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        q = widened(narrow, BLOCK_D, COMPUTE, OPERAND, PRECISION)
        if STACKED:
            grad = load_stacked(grad_ptr, grad_n, start, offset_n, choice, real, HEAD_DIM, BLOCK_R, BLOCK_D)
            reading = product(grad, rounded, COMPUTE, OPERAND, PRECISION)
            if EXACT:
                reading += product(grad, rest, COMPUTE, OPERAND, PRECISION)
        else:
            grads, reading = (), tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
            for r in tl.static_range(R):
                mine = real & (choice == r)
                grads = grads + (load_rows(grad_ptr, grad_n, start, offset_n, mine, HEAD_DIM, BLOCK_D),)
                context = tl.load(context_ptr + state + r * BLOCK_D * BLOCK_D + square)
                rounded = context.to(OPERAND)
                reading += product(grads[r], tl.trans(rounded), COMPUTE, OPERAND, PRECISION)
                if EXACT:
                    rest = (context - rounded.to(COMPUTE)).to(OPERAND)
                    reading += product(grads[r], tl.trans(rest), COMPUTE, OPERAND, PRECISION)
        gate = tl.full((BLOCK_N,), 1.0, COMPUTE)
        if ROUTED:
            if not HELD:
                router = load_vectors(router_ptr, HEAD_DIM, R, HEAD_DIM, BLOCK_D, COMPUTE)
            _, shares = route(q, router, R, BLOCK_N, COMPUTE, PRECISION)
            if SCALED:
                gate = pick(choice, shares[0], shares, R)
        alpha = pick(choice, tl.full((BLOCK_N,), 1.0, COMPUTE) * alphas[0], alphas, R)
        if not HELD:
            log_masses = load_vectors(log_mass_ptr, 3 * BLOCK_D, R, BLOCK_D, BLOCK_D, COMPUTE)
        log_mass = tl.broadcast_to(log_masses[0][None, :], (BLOCK_N, BLOCK_D))
        for r in tl.static_range(1, R):
            log_mass = tl.where((choice == r)[:, None], log_masses[r][None, :], log_mass)
        features, inverse = read_features(q, alpha[:, None], log_mass, PRECISION)
        grad_gate = tl.sum(features * reading, axis=1) * inverse
        gated = features * (gate * inverse)[:, None]
        grad_q = gated * (reading * alpha[:, None] - (alpha * grad_gate)[:, None])

        gated = gated.to(OPERAND)
        if STACKED:
            grad_context += product(tl.trans(grad), gated, COMPUTE, OPERAND, PRECISION)
        else:
            new_contexts = ()
            for r in tl.static_range(R):
                more = product(tl.trans(gated), grads[r], COMPUTE, OPERAND, PRECISION)
                new_contexts = new_contexts + (grad_contexts[r] + more,)
            grad_contexts = new_contexts
        deltas = tl.where(choice[:, None] == column[None, :] % BLOCK_R, -grad_gate[:, None], 0.0)
        deltas = split_columns(deltas, BLOCK_R, COLUMNS, COMPUTE, OPERAND)
        shift += product(tl.trans(deltas), gated, COMPUTE, OPERAND, PRECISION)
        if ROUTED:
            mean = tl.zeros((BLOCK_N,), COMPUTE)
            for r in tl.static_range(R):
                mean += shares[r] * pulls[r]
            routing = tl.zeros((BLOCK_N, COLUMNS), COMPUTE)
            for r in tl.static_range(R):
                mine = shares[r] * (pulls[r] - mean) * grad_balance
                if SCALED:
                    mine += gate * grad_gate * (tl.where(choice == r, 1.0, 0.0) - shares[r])
                mine = tl.where(real, mine, 0.0)
                routing = tl.where(column[None, :] % BLOCK_R == r, mine[:, None], routing)
            routing = split_columns(routing, BLOCK_R, COLUMNS, COMPUTE, OPERAND)
            grad_q += product(routing, weights_rounded, COMPUTE, OPERAND, PRECISION)
            if OPERAND != COMPUTE:
                grad_q += product(routing, weights_rest, COMPUTE, OPERAND, PRECISION)
            grad_router += product(tl.trans(routing), narrow, COMPUTE, OPERAND, PRECISION)
        store_rows(grad_q_ptr, gq_n, start, offset_n, keep, grad_q, HEAD_DIM, BLOCK_D)
    slot = head * R * splits + part
    if STACKED:
        position = (slot + stacked[:, None] // BLOCK_D * splits) * BLOCK_D * BLOCK_D
        position += offset_d[None, :] * BLOCK_D + stacked[:, None] % BLOCK_D
        tl.store(grad_context_ptr + position, grad_context, mask=exists)
    else:
        for r in tl.static_range(R):
            tl.store(grad_context_ptr + (slot + r * splits) * BLOCK_D * BLOCK_D + square, grad_contexts[r])
    row = tl.arange(0, BLOCK_R)[:, None]
    shift = tl.sum(tl.reshape(shift, (COLUMNS // BLOCK_R, BLOCK_R, BLOCK_D)), axis=0)
    tl.store(shift_ptr + (slot + row * splits) * BLOCK_D + offset_d[None, :], shift, mask=row < R)
    if ROUTED:
        grad_router = tl.sum(tl.reshape(grad_router, (COLUMNS // BLOCK_R, BLOCK_R, BLOCK_D)), axis=0)
        slot = (wide_h * num_batches + b) * splits + part
        tl.store(grad_router_ptr + (slot * BLOCK_R + row) * BLOCK_D + offset_d[None, :], grad_router)


@triton.jit
def router_gradient(
    slot_ptr, out_ptr, slots, resolution,  # (H, slots, R', D'), (H, R, D)
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Gradient of COLUMNS features of one head's router at one resolution, h · R + r, from the slots of all parts."""
    h, r = (resolution // R).to(tl.int64), resolution % R
    offset, column = tl.arange(0, BLOCK), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((BLOCK, COLUMNS), COMPUTE)
    for first in range(0, slots, BLOCK):
        position = ((h * slots + first + offset[:, None]) * BLOCK_R + r) * BLOCK_D + column[None, :]
        total += tl.load(slot_ptr + position, mask=(first + offset < slots)[:, None], other=0.0)
    out_ptr += (h * R + r) * HEAD_DIM + column
    tl.store(out_ptr, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)


@triton.jit
def merge_all_gradients_kernel(
    grad_context_slot_ptr, shift_slot_ptr, context_ptr, grad_context_ptr, shift_ptr, grad_router_slot_ptr,
    grad_router_ptr,
    summaries, splits, slots, num_heads,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """`merge_gradients_kernel` for every summary; the programs after those finish the router's gradient."""
    pid = tl.program_id(0)
    if pid < summaries:
        merge_gradients_kernel(
            grad_context_slot_ptr, shift_slot_ptr, context_ptr, context_ptr, grad_context_ptr, shift_ptr, context_ptr,
            splits, num_heads, False, HEAD_DIM, BLOCK_S, ROWS, BLOCK_D, COMPUTE, OPERAND,
        )  # fmt: skip
    else:
        router_gradient(
            grad_router_slot_ptr, grad_router_ptr, slots, pid - summaries,
            R, BLOCK_R, BLOCK, ROWS, HEAD_DIM, BLOCK_D, COMPUTE,
        )  # fmt: skip


def merge_all_gradients(
    grad_context: Tensor, shift: Tensor, context: Tensor, grad_router: Tensor, router: Tensor | None,
    shape: torch.Size, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dC and the shift of every summary, and the gradient of the router (H, R, D), all from slots, in one launch."""
    if router is None:
        merged, merged_shift, _ = merge_gradients(grad_context, shift, context, None, shape, dtype)
        return merged, merged_shift, None
    summaries, splits, width, _ = grad_context.shape
    heads, count, dim = router.shape
    slots, block = grad_router.shape[1:3]
    kinds, rows = arithmetic(dtype), row_block(width, splits)
    merged, merged_shift, grad_weights = (torch.empty_like(x) for x in (context, context[:, 0], router))
    merge_all_gradients_kernel[(summaries + heads * count, width // rows)](
        grad_context, shift, context, merged, merged_shift, grad_router, grad_weights, summaries, splits, slots, heads,
        R=count, BLOCK_R=block, BLOCK=ROUTER_SLOTS // rows, HEAD_DIM=dim, BLOCK_S=triton.next_power_of_2(splits),
        ROWS=rows, BLOCK_D=width, COMPUTE=kinds["COMPUTE"], OPERAND=kinds["OPERAND"], num_warps=4,
    )  # fmt: skip
    return merged, merged_shift, grad_weights
