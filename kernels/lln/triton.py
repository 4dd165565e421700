"""LLN attention in Triton: the query side, the Diag branch, and the launches of a call.

    A_i = softmax_l(α q_il + λ_l),   o_i = w₁ Σ_l A_il C_l + w₂ Diag_i

forward   moments (2 touches of one (B, H, N, D) tensor), keys (2), queries (2; with Diag 4)
backward  queries (3: q, do, dq; with Diag 2: q, do), keys (4), with Diag blocks instead (7: q, k, v, do, dq, dk, dv)

so that the floor is 13 touches, and 17 with Diag. The merges between them read splits · D² numbers a head.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import COUNTS, Config, arithmetic, block_dim, mask_arguments, split, state_dtype, strides
from kernels.common.tiles import NEVER, exponential, load_rows, place, product, real_rows, store_rows, widened
from kernels.lln.triton_keys import LOWEST, ONES, WIDEST_HELD, key_weights, keys_backward, summarise
from kernels.lln.triton_merge import merge_gradients

# By padded head dimension. A tile with Diag holds whole blocks of D tokens, and rows² scores.
QUERIES = {16: Config(64, 4, 3), 32: Config(64, 4, 3), 64: Config(64, 4, 2), 128: Config(64, 8, 2)}
DIAG_QUERIES = {16: Config(64, 4, 3), 32: Config(64, 4, 3), 64: Config(64, 4, 2), 128: Config(128, 8, 1)}
QUERIES_BACKWARD = {16: Config(64, 4, 3), 32: Config(64, 4, 3), 64: Config(64, 4, 2), 128: Config(64, 8, 1)}
BLOCKS_BACKWARD = {16: Config(64, 4, 2), 32: Config(64, 4, 2), 64: Config(64, 4, 1), 128: Config(128, 16, 1)}

NARROW = tl.constexpr(32)
"""Widest head whose states (λ, its two companions, shift) the blocks' pass loads once and holds."""

TINY = tl.constexpr(1e-30)
"""What a sum of weights is not divided below: it is zero in rows that see no key, and at least 1 in others."""


@triton.jit
def tile_rows(BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIAG: tl.constexpr):
    """Offsets of a tile's rows from its first token, and which rows are used.

    With Diag a block of HEAD_DIM tokens takes BLOCK_D rows, so that no tile cuts a block.
    """
    row = tl.arange(0, BLOCK_N)
    if DIAG:
        return (row // BLOCK_D) * HEAD_DIM + row % BLOCK_D, (row % BLOCK_D) < HEAD_DIM
    else:
        return row, row < BLOCK_N


@triton.jit
def read_features(q, alpha, log_mass, PRECISION: tl.constexpr):
    """A = softmax_l(α q + λ) of a tile, before it is normalised, and the factors of its rows that do that.

    α and λ broadcast to q.
    """
    logits = q * alpha + log_mass
    features = exponential(logits, tl.max(logits, axis=1)[:, None], PRECISION)
    return features, 1.0 / tl.sum(features, axis=1)


@triton.jit
def two_columns(x, OPERAND: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr):
    """x (BLOCK_N,) as an operand of ONES columns that sum to it, nearly as exact as fp32: rounded, and what was cut."""
    column = tl.arange(0, ONES)[None, :]
    rounded = x.to(OPERAND)
    rest = (x - rounded.to(COMPUTE)).to(OPERAND)
    zero = tl.zeros((BLOCK_N, ONES), OPERAND)
    return tl.where(column == 0, rounded[:, None], tl.where(column == 1, rest[:, None], zero))


@triton.jit
def block_weights(
    q, k, real, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P = softmax(q kᵀ / √D) over the real keys of each row's own block; rows without any are zero."""
    row = tl.arange(0, BLOCK_N)
    scores = product(q, tl.trans(k), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5)
    visible = (row[:, None] // BLOCK_D == row[None, :] // BLOCK_D) & real[None, :]
    scores = tl.where(visible, scores, NEVER)
    weights = exponential(scores, tl.maximum(tl.max(scores, axis=1), LOWEST)[:, None], PRECISION)
    return weights * (1.0 / tl.maximum(tl.sum(weights, axis=1), TINY))[:, None]


@triton.jit
def mixing_weight(ptr, number, h, LEARNED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                  COMPUTE: tl.constexpr):  # fmt: skip
    """Weight of one branch by feature, (BLOCK_D,): row h of an (H, D) tensor, or one number."""
    if LEARNED:
        offset_d = tl.arange(0, BLOCK_D)
        return tl.load(ptr + h * HEAD_DIM + offset_d, mask=offset_d < HEAD_DIM, other=0.0).to(COMPUTE)
    else:
        return tl.full((BLOCK_D,), 1.0, COMPUTE) * tl.cast(number, COMPUTE)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def queries_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    alpha_ptr, context_ptr, log_mass_ptr, mix_lln_ptr, mix_diag_ptr,
    out_ptr, out_b, out_h, out_n,
    mix_lln, mix_diag, length, num_heads, splits, chunk,
    DIAG: tl.constexpr, LEARNED: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of one part of a head; k and v are read with DIAG only."""
    b, h, part = place(tl.program_id(0), num_heads, splits)
    wide_h = h.to(tl.int64)
    q_ptr += b * q_b + wide_h * q_h
    k_ptr += b * k_b + wide_h * k_h
    v_ptr += b * v_b + wide_h * v_h
    out_ptr += b * out_b + wide_h * out_h
    mask_ptr += b * mask_b
    offset_d = tl.arange(0, BLOCK_D)
    offset_n, used = tile_rows(BLOCK_N, HEAD_DIM, BLOCK_D, DIAG)
    head = b * num_heads + h
    alpha = tl.load(alpha_ptr).to(COMPUTE)
    log_mass = tl.load(log_mass_ptr + head * 3 * BLOCK_D + offset_d)
    context = tl.load(context_ptr + (head * BLOCK_D + offset_d[:, None]) * BLOCK_D + offset_d[None, :]).to(OPERAND)
    STEP: tl.constexpr = BLOCK_N // BLOCK_D * HEAD_DIM if DIAG else BLOCK_N
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), STEP):
        real = used & real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        q = load_rows(q_ptr, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        wide = widened(q, BLOCK_D, COMPUTE, OPERAND, PRECISION)
        features, inverse = read_features(wide, alpha, log_mass[None, :], PRECISION)
        out = product(features, context, COMPUTE, OPERAND, PRECISION) * inverse[:, None]
        if DIAG:
            k = load_rows(k_ptr, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
            v = load_rows(v_ptr, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
            weights = block_weights(q, k, real, HEAD_DIM, BLOCK_N, BLOCK_D, COMPUTE, OPERAND, PRECISION)
            block = product(weights, v, COMPUTE, OPERAND, PRECISION)
            from_lln = mixing_weight(mix_lln_ptr, mix_lln, h, LEARNED, HEAD_DIM, BLOCK_D, COMPUTE)
            from_diag = mixing_weight(mix_diag_ptr, mix_diag, h, LEARNED, HEAD_DIM, BLOCK_D, COMPUTE)
            out = out * from_lln[None, :] + block * from_diag[None, :]
        keep = used & (start + offset_n < length)
        if HAS_MASK:
            out = tl.where(real[:, None], out, 0.0)
        store_rows(out_ptr, out_n, start, offset_n, keep, out, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def queries_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    alpha_ptr, context_ptr, log_mass_ptr, mix_lln_ptr,
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_context_ptr, shift_ptr,  # slots (B·H, splits, …)
    mix_lln, length, num_heads, splits, chunk,
    DIAG: tl.constexpr, LEARNED: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the summary from one part of a head, and dq, which with DIAG is left to `blocks_backward_kernel`.

    dA = do Cᵀ, δ = Σ_l A dA, dL = A (dA − δ), dq = α dL, dC = Aᵀ do, and −Aᵀ δ for `merge_gradients_kernel`.
    """
    b, h, part = place(tl.program_id(0), num_heads, splits)
    wide_h = h.to(tl.int64)
    q_ptr += b * q_b + wide_h * q_h
    grad_ptr += b * grad_b + wide_h * grad_h
    grad_q_ptr += b * gq_b + wide_h * gq_h
    mask_ptr += b * mask_b
    offset_n, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    head = b * num_heads + h
    alpha = tl.load(alpha_ptr).to(COMPUTE)
    log_mass = tl.load(log_mass_ptr + head * 3 * BLOCK_D + offset_d)
    square = offset_d[:, None] * BLOCK_D + offset_d[None, :]
    context = tl.load(context_ptr + head * BLOCK_D * BLOCK_D + square)
    weight = mixing_weight(mix_lln_ptr, mix_lln, h, LEARNED, HEAD_DIM, BLOCK_D, COMPUTE)
    if DIAG:  # here and not in `grad`, which then enters the products as it was read
        context *= weight[None, :]
    context = context.to(OPERAND)
    grad_context = tl.zeros((BLOCK_D, BLOCK_D), COMPUTE)
    shift = tl.zeros((BLOCK_D, 1 if BLOCK_D > WIDEST_HELD else ONES), COMPUTE)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        q = load_rows(q_ptr, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        wide = widened(q, BLOCK_D, COMPUTE, OPERAND, PRECISION)
        grad = load_rows(grad_ptr, grad_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        features, inverse = read_features(wide, alpha, log_mass[None, :], PRECISION)
        reading = product(grad, tl.trans(context), COMPUTE, OPERAND, PRECISION)
        delta = tl.sum(features * reading, axis=1) * inverse
        features *= inverse[:, None]
        columns = tl.trans(features.to(OPERAND))
        grad_context += product(columns, grad, COMPUTE, OPERAND, PRECISION)
        if BLOCK_D > WIDEST_HELD:
            shift -= tl.sum(features.to(OPERAND).to(COMPUTE) * delta[:, None], axis=0)[:, None]
        else:
            shift += product(columns, two_columns(-delta, OPERAND, COMPUTE, BLOCK_N), COMPUTE, OPERAND, PRECISION)
        if not DIAG:
            keep = start + offset_n < length
            grad_q = features * (reading * alpha - (delta * alpha)[:, None])
            store_rows(grad_q_ptr, gq_n, start, offset_n, keep, grad_q, HEAD_DIM, BLOCK_D)
    if DIAG and not LEARNED:  # what is learned enters in `merge_gradients_kernel`
        grad_context *= weight[None, :]
    slot = head * splits + part
    tl.store(shift_ptr + slot * BLOCK_D + offset_d, tl.sum(shift, axis=1))
    tl.store(grad_context_ptr + slot * BLOCK_D * BLOCK_D + square, grad_context)


@triton.jit
def key_states(log_mass_ptr, shift_ptr, head, BLOCK_D: tl.constexpr):
    """Column maximum of ℓ, exp(maximum − λ), and shift of a head, (BLOCK_D,) each."""
    offset_d = tl.arange(0, BLOCK_D)
    peak_ptr = log_mass_ptr + (head * 3 + 1) * BLOCK_D + offset_d
    return tl.load(peak_ptr), tl.load(peak_ptr + BLOCK_D), tl.load(shift_ptr + head * BLOCK_D + offset_d)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def blocks_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    alpha_ptr, beta_ptr, context_ptr, log_mass_ptr, grad_context_ptr, shift_ptr, mix_lln_ptr, mix_diag_ptr,
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    grad_mix_ptr,  # slots (B·H, splits, D')
    mix_lln, mix_diag, length, num_heads, splits, chunk,
    LEARNED: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of both branches of LLN+Diag in one pass over tiles of whole blocks."""
    b, h, part = place(tl.program_id(0), num_heads, splits)
    wide_h = h.to(tl.int64)
    q_ptr += b * q_b + wide_h * q_h
    k_ptr += b * k_b + wide_h * k_h
    v_ptr += b * v_b + wide_h * v_h
    grad_ptr += b * grad_b + wide_h * grad_h
    grad_q_ptr += b * gq_b + wide_h * gq_h
    grad_k_ptr += b * gk_b + wide_h * gk_h
    grad_v_ptr += b * gv_b + wide_h * gv_h
    mask_ptr += b * mask_b
    offset_d = tl.arange(0, BLOCK_D)
    offset_n, used = tile_rows(BLOCK_N, HEAD_DIM, BLOCK_D, True)
    head = b * num_heads + h
    alpha, beta = tl.load(alpha_ptr).to(COMPUTE), tl.load(beta_ptr).to(COMPUTE)
    square = head * BLOCK_D * BLOCK_D + offset_d[:, None] * BLOCK_D + offset_d[None, :]
    from_lln = mixing_weight(mix_lln_ptr, mix_lln, h, LEARNED, HEAD_DIM, BLOCK_D, COMPUTE)
    from_diag = mixing_weight(mix_diag_ptr, mix_diag, h, LEARNED, HEAD_DIM, BLOCK_D, COMPUTE)
    grad_mix = tl.zeros((BLOCK_D,), COMPUTE)
    if BLOCK_D <= NARROW:
        log_mass = tl.load(log_mass_ptr + head * 3 * BLOCK_D + offset_d)
        peak, scale, shift = key_states(log_mass_ptr, shift_ptr, head, BLOCK_D)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N // BLOCK_D * HEAD_DIM):
        real = used & real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        keep = used & (start + offset_n < length)
        q = load_rows(q_ptr, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        k = load_rows(k_ptr, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_ptr, grad_n, start, offset_n, real, HEAD_DIM, BLOCK_D)

        weights = block_weights(q, k, real, HEAD_DIM, BLOCK_N, BLOCK_D, COMPUTE, OPERAND, PRECISION)
        grad_v = product(tl.trans(weights), grad, COMPUTE, OPERAND, PRECISION)  # of the unweighted branch
        if LEARNED:
            grad_mix += tl.sum(grad_v * v.to(COMPUTE), axis=0)  # Σ_i do_i Diag_i = Σ_j v_j (Pᵀ do)_j
        grad_v *= from_diag[None, :]
        weighted = grad.to(COMPUTE) * from_diag[None, :]
        grad_weights = product(weighted, tl.trans(v), COMPUTE, OPERAND, PRECISION)
        grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, axis=1)[:, None]) * (HEAD_DIM**-0.5)
        grad_q = product(grad_scores, k, COMPUTE, OPERAND, PRECISION)
        grad_k = product(tl.trans(grad_scores), q, COMPUTE, OPERAND, PRECISION)

        context = tl.load(context_ptr + square)
        if BLOCK_D > NARROW:  # held through the loop the states would push tiles out of the registers
            log_mass = tl.load(log_mass_ptr + head * 3 * BLOCK_D + offset_d)
        wide = widened(q, BLOCK_D, COMPUTE, OPERAND, PRECISION)
        features, inverse = read_features(wide, alpha, log_mass[None, :], PRECISION)
        reading = product(grad.to(COMPUTE) * from_lln[None, :], tl.trans(context), COMPUTE, OPERAND, PRECISION)
        delta = tl.sum(features * reading, axis=1) * inverse
        grad_q += features * ((reading - delta[:, None]) * (inverse * alpha)[:, None])
        store_rows(grad_q_ptr, gq_n, start, offset_n, keep, grad_q, HEAD_DIM, BLOCK_D)

        grad_context = tl.load(grad_context_ptr + square)
        if BLOCK_D > NARROW:
            peak, scale, shift = key_states(log_mass_ptr, shift_ptr, head, BLOCK_D)
        key_features = key_weights(widened(k, BLOCK_D, COMPUTE, OPERAND, PRECISION) * beta, peak, scale, PRECISION)
        reading = product(v, tl.trans(grad_context), COMPUTE, OPERAND, PRECISION)
        grad_k += beta * key_features * (reading + shift[None, :])
        grad_v += product(key_features, grad_context, COMPUTE, OPERAND, PRECISION)
        if HAS_MASK:
            grad_k = tl.where(real[:, None], grad_k, 0.0)
            grad_v = tl.where(real[:, None], grad_v, 0.0)
        store_rows(grad_k_ptr, gk_n, start, offset_n, keep, grad_k, HEAD_DIM, BLOCK_D)
        store_rows(grad_v_ptr, gv_n, start, offset_n, keep, grad_v, HEAD_DIM, BLOCK_D)
    if LEARNED:
        tl.store(grad_mix_ptr + (head * splits + part) * BLOCK_D + offset_d, grad_mix)


# ------------------------------------------------------------------------------------------------------------ launches


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, alpha: Tensor, beta: Tensor, diag: bool,
    mix: tuple[float, float], learned: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (B, H, N, D), laid out as (B, N, H, D), and the summary (C, λ) that the backward pass reads.

    mix       weights of the two branches, with `diag`
    learned   the same by head and feature, (H, D) each, in the dtype of states; then `mix` is not read
    """
    batch, heads, length, dim = q.shape
    width = block_dim(dim)
    context, log_mass = summarise(k, v, key_mask, beta, (1,))
    out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    config = (DIAG_QUERIES if diag else QUERIES)[width]
    splits, chunk = split(length, config.rows // width * dim if diag else config.rows, batch * heads)
    queries_kernel[(batch * heads * splits,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask_arguments(key_mask, q),
        alpha, context, log_mass, *(learned or (context, context)), out, *strides(out),
        *mix, length, heads, splits, chunk,
        DIAG=diag, LEARNED=learned is not None, HAS_MASK=key_mask is not None,
        HEAD_DIM=dim, BLOCK_N=config.rows, BLOCK_D=width, **arithmetic(q.dtype), **config.options,
    )  # fmt: skip
    return out, context, log_mass


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, alpha: Tensor, beta: Tensor,
    context: Tensor, log_mass: Tensor, diag: bool, mix: tuple[float, float], learned: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv in the layout of q, k, v, and, where `learned`, the gradients of the two weights, (H, D) each."""
    batch, heads, length, dim = q.shape
    width, kinds = block_dim(dim), arithmetic(q.dtype)
    flags = dict(LEARNED=learned is not None, HAS_MASK=key_mask is not None, HEAD_DIM=dim, BLOCK_D=width, **kinds)
    options = dict(dtype=state_dtype(q.dtype), device=q.device)
    grad_q = torch.empty_like(q)
    config = QUERIES_BACKWARD[width]
    splits, chunk = split(length, config.rows, batch * heads)
    grad_context = torch.empty(batch * heads, splits, width, width, **options)
    shift = torch.empty(batch * heads, splits, width, **options)
    mix_lln, mix_diag = learned or (context, context)
    queries_backward_kernel[(batch * heads * splits,)](
        q, *strides(q), grad, *strides(grad), *mask_arguments(key_mask, q),
        alpha, context, log_mass, mix_lln, grad_q, *strides(grad_q), grad_context, shift,
        mix[0], length, heads, splits, chunk,
        DIAG=diag, BLOCK_N=config.rows, **flags, **config.options,
    )  # fmt: skip
    merged, shift, grad_lln = merge_gradients(
        grad_context, shift, context, None if learned is None else mix_lln, q.shape, q.dtype
    )
    if not diag:
        return grad_q, *keys_backward(k, v, key_mask, beta, log_mass, merged, shift, (1,))

    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    config = BLOCKS_BACKWARD[width]
    splits, chunk = split(length, config.rows // width * dim, batch * heads)
    grad_mix = torch.empty(batch, heads, splits, width, **options) if learned is not None else context
    blocks_backward_kernel[(batch * heads * splits,)](
        q, *strides(q), k, *strides(k), v, *strides(v), grad, *strides(grad), *mask_arguments(key_mask, q),
        alpha, beta, context, log_mass, merged, shift, mix_lln, mix_diag,
        grad_q, *strides(grad_q), grad_k, *strides(grad_k), grad_v, *strides(grad_v), grad_mix,
        *mix, length, heads, splits, chunk, BLOCK_N=config.rows, **flags, **config.options,
    )  # fmt: skip
    if learned is None or grad_lln is None:
        return grad_q, grad_k, grad_v
    return grad_q, grad_k, grad_v, grad_lln, grad_mix.sum((0, 2))[:, :dim].contiguous()
