"""Combiner-Fixed in Triton, backward: summaries from all queries, their shares, then everything else by span.

With P from the stored normaliser, δ_i = do_i·out_i and dS = P (do·[v | h] − δ):

    dh_r = Σ_i P_ir do_i,  dk̂_r = τ Σ_i dS_ir q_i                                      over all queries, in parts
    dq_i = τ (Σ_j dS_ij k_j + Σ_r dS_ir k̂_r),  dk_j = τ Σ_i dS_ij q_i,  dv_j = Σ_i P_ij do_i   inside a span
    ds_j = a_j (dh·v_j − Σ_l a_l dh·v_l),  dv_j += a_j dh,  dk_j += τ ds_j q̂,  dq̂ = τ Σ_j ds_j k_j   its summary

and dq̂, dk̂ go to the rows that hold the maximum, in equal shares. Every element has one owner; parts of a sum over
queries have slots of their own, which the span that reads them adds in fixed order.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.combiner.triton import Shape, constants, fit, load_summaries, visible
from kernels.common.launch import COUNTS, Config, block_dim, mask_arguments, split, strides
from kernels.common.tiles import LOG2E, NEVER, load_rows, place, product, real_rows, store_rows

# By summaries of a tile, then by rows of a tile: the span, padded. Rows are those of a tile of queries.
SUMMARIES = {16: Config(32, 4, 3), 32: Config(64, 4, 3), 64: Config(64, 4, 3), 128: Config(64, 4, 3)}
SHARES = {16: Config(16, 1, 1), 32: Config(32, 1, 1), 64: Config(64, 1, 1), 128: Config(128, 1, 1)}
SPANS = {16: Config(16, 1, 1), 32: Config(32, 2, 1), 64: Config(64, 4, 1), 128: Config(64, 4, 1)}


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def summaries_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    out_ptr, out_b, out_h, out_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    key_ptr, value_ptr, bias_ptr,  # (B·H, G, D'), (B·H, G, D'), (B·H, G)
    norm_ptr, delta_ptr,  # (B·H, N)
    grad_key_ptr, grad_value_ptr,  # slots (B·H, splits, G, D')
    length, num_heads, spans, splits, chunk,
    SPAN: tl.constexpr, CAUSAL: tl.constexpr, INCLUDE_OWN: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk̂ / τ and dh of a tile of summaries from one part of the queries, and δ of these queries.

    Summaries are rows here, so that Pᵀ and dSᵀ enter their products as they are.
    """
    b, h, part = place(tl.program_id(0), num_heads, splits)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    q_ptr += b * q_b + wide_h * q_h
    out_ptr += b * out_b + wide_h * out_h
    grad_ptr += b * grad_b + wide_h * grad_h
    mask_ptr += b * mask_b
    first = tl.program_id(1) * BLOCK_G
    offset_n, region = tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_G)
    at = head * spans
    key, value, bias = load_summaries(
        key_ptr + at * BLOCK_D, value_ptr + at * BLOCK_D, bias_ptr + at, first, spans, BLOCK_G, BLOCK_D, COMPUTE
    )
    grad_key, grad_value = tl.zeros((BLOCK_G, BLOCK_D), COMPUTE), tl.zeros((BLOCK_G, BLOCK_D), COMPUTE)
    coming = real_rows(mask_ptr, mask_n, part * chunk, length, offset_n, HAS_MASK)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        # Read a step ahead: loads that wait for a mask could not be kept in flight.
        real, coming = coming, real_rows(mask_ptr, mask_n, start + BLOCK_N, length, offset_n, HAS_MASK)
        keep = start + offset_n < length
        q = load_rows(q_ptr, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        out = load_rows(out_ptr, out_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_ptr, grad_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        norm = tl.load(norm_ptr + head * length + start + offset_n, mask=keep, other=-NEVER)
        delta = tl.sum(grad.to(COMPUTE) * out.to(COMPUTE), axis=1)
        if tl.program_id(1) == 0:
            tl.store(delta_ptr + head * length + start + offset_n, delta, mask=keep)
        span = (start + offset_n) // SPAN
        logits = product(key, tl.trans(q), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E)
        logits = logits + visible(bias[:, None], region[:, None], span[None, :], CAUSAL, INCLUDE_OWN)
        weights = tl.exp2(logits - norm[None, :])
        grad_value += product(weights, grad, COMPUTE, OPERAND, PRECISION)
        reading = product(value, tl.trans(grad), COMPUTE, OPERAND, PRECISION)
        grad_key += product(weights * (reading - delta[None, :]), q, COMPUTE, OPERAND, PRECISION)
    slot = ((head * splits + part) * spans + region[:, None]) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (region < spans)[:, None]
    tl.store(grad_key_ptr + slot, grad_key, mask=inside)
    tl.store(grad_value_ptr + slot, grad_value, mask=inside)


@triton.jit
def sum_slots(ptr, slots, stride, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):
    """Sum of `slots` rows that lie `stride` apart, (BLOCK_D,)."""
    offset_p, total = tl.arange(0, 8), tl.zeros((8, BLOCK_D), COMPUTE)
    for first in range(0, slots, 8):
        position = (first + offset_p).to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
        total += tl.load(ptr + position, mask=(first + offset_p < slots)[:, None], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def shares_backward_kernel(
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    share_ptr, ties_ptr, grad_key_ptr, grad_value_ptr,  # (B·H, N), (B·H, G, 2, D'), slots (B·H, slots, G, D')
    grad_share_ptr, passed_ptr,  # ds / τ (B·H, N); dh and, by tie, dq̂ / τ and dk̂ / τ (B·H, G, 3, D')
    length, num_heads, spans, slots,
    SPAN: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What the summary of one span passes to its tokens."""
    b, h, span = place(tl.num_programs(0) - 1 - tl.program_id(0), num_heads, spans)
    wide_h, head = h.to(tl.int64), b * num_heads + h
    start, offset_n, offset_d = span * SPAN, tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    keep = (start + offset_n < length) & (offset_n < SPAN)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK) & keep
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    share = tl.load(share_ptr + head * length + start + offset_n, mask=keep, other=0.0)
    slot = (head * slots * spans + span) * BLOCK_D
    grad_key = sum_slots(grad_key_ptr + slot, slots, spans * BLOCK_D, BLOCK_D, COMPUTE)
    grad_value = sum_slots(grad_value_ptr + slot, slots, spans * BLOCK_D, BLOCK_D, COMPUTE)
    grad_share = tl.sum(v * grad_value[None, :], axis=1)
    grad_share = share * (grad_share - tl.sum(share * grad_share, axis=0))
    tl.store(grad_share_ptr + head * length + start + offset_n, grad_share, mask=keep)
    ties_ptr += (head * spans + span) * 2 * BLOCK_D + offset_d
    passed_ptr += (head * spans + span) * 3 * BLOCK_D + offset_d
    tl.store(passed_ptr, grad_value)
    tl.store(passed_ptr + BLOCK_D, tl.sum(grad_share[:, None] * k, axis=0) * tl.load(ties_ptr))
    tl.store(passed_ptr + 2 * BLOCK_D, grad_key * tl.load(ties_ptr + BLOCK_D))


@triton.jit
def summaries_gradient(
    q, grad, norm, delta, key, value, hidden,
    SCALE: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q / τ from one tile of summaries."""
    logits = product(q, tl.trans(key), COMPUTE, OPERAND, PRECISION) * SCALE + hidden[None, :]
    weights = tl.exp2(logits - norm[:, None])
    reading = product(grad, tl.trans(value), COMPUTE, OPERAND, PRECISION)
    return product(weights * (reading - delta[:, None]), key, COMPUTE, OPERAND, PRECISION)


@triton.jit
def spans_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    key_ptr, value_ptr, asking_ptr, bias_ptr,  # k̂, h, q̂ (B·H, G, D'), bias (B·H, G)
    norm_ptr, delta_ptr, share_ptr, grad_share_ptr, passed_ptr,  # (B·H, N), the last (B·H, G, 3, D')
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    length, num_heads, spans,
    SPAN: tl.constexpr, CAUSAL: tl.constexpr, INCLUDE_OWN: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one span of a head, with what its own summary passes on."""
    b, h, span = place(tl.program_id(0), num_heads, spans)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    q_ptr += b * q_b + wide_h * q_h
    grad_ptr += b * grad_b + wide_h * grad_h
    grad_q_ptr += b * gq_b + wide_h * gq_h
    mask_ptr += b * mask_b
    norm_ptr += head * length
    delta_ptr += head * length
    key_ptr += head * spans * BLOCK_D
    value_ptr += head * spans * BLOCK_D
    asking_ptr += (head * spans + span) * BLOCK_D
    bias_ptr += head * spans
    passed_ptr += (head * spans + span) * 3 * BLOCK_D
    TAU: tl.constexpr = HEAD_DIM**-0.5
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    offset_n, offset_m, offset_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    start, region = span * SPAN, tl.arange(0, BLOCK_G)
    inside = (start + offset_n < length) & (offset_n < SPAN)
    real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK) & inside
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    token_bias = tl.where(real, 0.0, NEVER)
    grad_k, grad_v = tl.zeros((BLOCK_S, BLOCK_D), COMPUTE), tl.zeros((BLOCK_S, BLOCK_D), COMPUTE)
    for row in range(0, SPAN, BLOCK_M):
        keep = (start + row + offset_m < length) & (row + offset_m < SPAN)
        asks = real_rows(mask_ptr, mask_n, start + row, length, offset_m, HAS_MASK) & keep
        q = load_rows(q_ptr, q_n, start + row, offset_m, asks, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_ptr, grad_n, start + row, offset_m, asks, HEAD_DIM, BLOCK_D)
        norm = tl.load(norm_ptr + start + row + offset_m, mask=keep, other=-NEVER)
        delta = tl.load(delta_ptr + start + row + offset_m, mask=keep, other=0.0)
        # Keys are rows here, so that the transposes of P and dS enter the products for dv and dk as they are.
        logits = product(k, tl.trans(q), COMPUTE, OPERAND, PRECISION) * SCALE + token_bias[:, None]
        if CAUSAL:
            logits = tl.where(offset_n[:, None] <= row + offset_m[None, :], logits, NEVER)
        weights = tl.exp2(logits - norm[None, :])
        grad_v += product(weights, grad, COMPUTE, OPERAND, PRECISION)
        reading = product(v, tl.trans(grad), COMPUTE, OPERAND, PRECISION)
        grad_logits = weights * (reading - delta[None, :])
        grad_k += product(grad_logits, q, COMPUTE, OPERAND, PRECISION)
        grad_q = product(tl.trans(grad_logits), k, COMPUTE, OPERAND, PRECISION)
        for first in range(0, span if CAUSAL else spans, BLOCK_G):
            key, value, bias = load_summaries(key_ptr, value_ptr, bias_ptr, first, spans, BLOCK_G, BLOCK_D, COMPUTE)
            hidden = visible(bias, first + region, span, CAUSAL, INCLUDE_OWN)
            grad_q += summaries_gradient(q, grad, norm, delta, key, value, hidden, SCALE, COMPUTE, OPERAND, PRECISION)
        holds = asks[:, None] & (q == tl.load(asking_ptr + offset_d)[None, :])
        grad_q = tl.where(holds, grad_q + tl.load(passed_ptr + BLOCK_D + offset_d)[None, :], grad_q) * TAU
        store_rows(grad_q_ptr, gq_n, start + row, offset_m, keep, grad_q, HEAD_DIM, BLOCK_D)
    at = head * length + start + offset_n
    share = tl.load(share_ptr + at, mask=inside, other=0.0)
    grad_v += share[:, None] * tl.load(passed_ptr + offset_d)[None, :]
    store_rows(grad_v_ptr + b * gv_b + wide_h * gv_h, gv_n, start, offset_n, inside, grad_v, HEAD_DIM, BLOCK_D)
    grad_share = tl.load(grad_share_ptr + at, mask=inside, other=0.0)
    grad_k += grad_share[:, None] * tl.load(asking_ptr + offset_d).to(COMPUTE)[None, :]
    holds = real[:, None] & (k == tl.load(key_ptr + span * BLOCK_D + offset_d)[None, :])
    grad_k = tl.where(holds, grad_k + tl.load(passed_ptr + 2 * BLOCK_D + offset_d)[None, :], grad_k) * TAU
    store_rows(grad_k_ptr + b * gk_b + wide_h * gk_h, gk_n, start, offset_n, inside, grad_k, HEAD_DIM, BLOCK_D)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: list[Tensor],
    span: int, causal: bool, include_own: bool,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv in the layout of q, k, v."""
    shape = Shape(*q.shape, span)
    batch, heads, length, dim, _ = shape
    spans, flags = shape.spans, constants(q, shape, key_mask is not None, causal, include_own)
    out, norm, key, value, asking, bias, share, ties = state
    mask = mask_arguments(key_mask, q)
    config = fit(SUMMARIES[shape.summaries], q)
    tiles = triton.cdiv(spans, shape.summaries)
    slots, chunk = split(length, config.rows, batch * heads * tiles)
    delta = torch.empty_like(norm)
    grad_key, grad_value = (
        torch.empty(batch * heads, slots, spans, block_dim(dim), dtype=norm.dtype, device=q.device) for _ in range(2)
    )
    summaries_backward_kernel[(batch * heads * slots, tiles)](
        q, *strides(q), out, *strides(out), grad, *strides(grad), *mask, key, value, bias, norm, delta,
        grad_key, grad_value, length, heads, spans, slots, chunk,
        BLOCK_N=config.rows, **{k: x for k, x in flags.items() if k != "BLOCK_S"}, **config.options,
    )  # fmt: skip
    keys = (k, *strides(k), v, *strides(v))
    grad_share, passed = torch.empty_like(share), norm.new_empty(batch * heads, spans, 3, block_dim(dim))
    shares_backward_kernel[(batch * heads * spans,)](
        *keys, *mask, share, ties, grad_key, grad_value, grad_share, passed, length, heads, spans, slots,
        SPAN=span, HAS_MASK=key_mask is not None, HEAD_DIM=dim, BLOCK_S=shape.rows,
        BLOCK_D=block_dim(dim), COMPUTE=flags["COMPUTE"], **fit(SHARES[shape.rows], q).options,
    )  # fmt: skip
    grads = [torch.empty_like(x) for x in (q, k, v)]
    grad_q, grad_k, grad_v = grads
    config = fit(SPANS[shape.rows], q)
    spans_backward_kernel[(batch * heads * spans,)](
        q, *strides(q), *keys, grad, *strides(grad), *mask,
        key, value, asking, bias, norm, delta, share, grad_share, passed,
        grad_q, *strides(grad_q), grad_k, *strides(grad_k), grad_v, *strides(grad_v), length, heads, spans,
        BLOCK_M=config.rows, **flags, **config.options,
    )  # fmt: skip
    return grads
