"""The key side of LLN and AdaMRA: the summary of (fused) keys and values, and its backward pass.

With ℓ_j = β k'_j, where k' is the mean of a window of RATE keys (RATE = 1: the key itself),

    λ_l = ln Σ_w exp ℓ_wl,   C_l = Σ_w exp(ℓ_wl − λ_l) v'_w

Σ_w over windows is Σ_j over real tokens, each with the weight that it has in the mean of its window. Nothing that is
exponentiated exceeds zero. Parts of a sequence write to slots of their own, which one launch merges in fixed order.

Floor, in touches of one (B, H, N, D) tensor: summary 2 (k, v), backward 4 (k, v, dk, dv).
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import (
    Config,
    arithmetic,
    block_dim,
    mask_arguments,
    split,
    state_dtype,
    strides,
)
from kernels.common.tiles import (
    NEVER,
    load_rows,
    place,
    product,
    real_rows,
    store_rows,
    window_mean,
    window_weights,
)

# By padded head dimension. Fixed, never tuned at run time: a choice by length would re-tune in the middle of training.
SUMMARY = {16: Config(128, 4, 2), 32: Config(128, 4, 2), 64: Config(128, 8, 2), 128: Config(64, 8, 2)}
BACKWARD = {16: Config(128, 4, 2), 32: Config(128, 4, 2), 64: Config(64, 4, 2), 128: Config(64, 8, 1)}

BACKWARD_RATES = {16: Config(128, 8, 2), 32: Config(128, 8, 2), 64: Config(128, 8, 1), 128: Config(64, 16, 1)}


@triton.jit
def summarise_tiles(
    k_ptr, k_n, v_ptr, v_n, mask_ptr, mask_n, beta, peak_ptr, mass_ptr, context_ptr, first, last, length,
    RATE: tl.constexpr, HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Summary of the tokens first … last of a head at one rate, relative to its own column maximum."""
    offset_n, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    peak = tl.full((BLOCK_D,), NEVER, COMPUTE)
    mass = tl.zeros((BLOCK_D,), COMPUTE)
    context = tl.zeros((BLOCK_D, BLOCK_D), COMPUTE)
    for start in range(first, last, BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        k = load_rows(k_ptr, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
        v = load_rows(v_ptr, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        weight = window_weights(real, RATE, BLOCK_N, COMPUTE)
        fused = window_mean(k, weight, RATE, BLOCK_N, BLOCK_D)
        logits = tl.where(real[:, None], beta * fused, NEVER)
        higher = tl.maximum(peak, tl.max(logits, axis=0))
        features = (tl.exp(logits - higher[None, :]) * weight[:, None]).to(OPERAND)
        scale = tl.exp(peak - higher)
        mass = mass * scale + tl.sum(features.to(COMPUTE), axis=0)
        context = context * scale[:, None] + product(tl.trans(features), v, COMPUTE, OPERAND, PRECISION)
        peak = higher
    tl.store(peak_ptr + offset_d, peak)
    tl.store(mass_ptr + offset_d, mass)
    tl.store(context_ptr + offset_d[:, None] * BLOCK_D + offset_d[None, :], context)


@triton.jit
def summarise_kernel(
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    beta_ptr,  # (R,)
    peak_ptr, mass_ptr, context_ptr,  # slots (B·H, R, splits, …)
    length, num_heads, splits, chunk,
    RATES: tl.constexpr, R: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of a head at one rate; the rates of a part are neighbours, so that all but the first read from cache."""
    pid = tl.program_id(0)
    b, h, part = place(pid // R, num_heads, splits)
    rate = pid % R
    slot = ((b * num_heads + h) * R + rate) * splits + part
    k_ptr += b * k_b + h.to(tl.int64) * k_h
    v_ptr += b * v_b + h.to(tl.int64) * v_h
    mask_ptr += b * mask_b
    peak_ptr += slot * BLOCK_D
    mass_ptr += slot * BLOCK_D
    context_ptr += slot * BLOCK_D * BLOCK_D
    beta = tl.load(beta_ptr + rate).to(COMPUTE)
    first, last = part * chunk, tl.minimum((part + 1) * chunk, length)
    for r in tl.static_range(R):
        if rate == r:
            summarise_tiles(
                k_ptr, k_n, v_ptr, v_n, mask_ptr, mask_n, beta, peak_ptr, mass_ptr, context_ptr, first, last, length,
                RATES[r], HAS_MASK, HEAD_DIM, BLOCK_N, BLOCK_D, COMPUTE, OPERAND, PRECISION,
            )  # fmt: skip


@triton.jit
def merge_summaries_kernel(
    peak_ptr, mass_ptr, context_ptr,  # slots (B·H·R, splits, …)
    out_context_ptr, log_mass_ptr,  # (B·H·R, D', D'), (B·H·R, 3, D')
    splits,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """C and λ of ROWS features of one summary from the slots of its parts."""
    summary = tl.program_id(0).to(tl.int64)
    offset_s, offset_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot, inside = summary * splits + offset_s, (offset_s < splits)[:, None]
    peaks = tl.load(peak_ptr + slot[:, None] * BLOCK_D + row[None, :], mask=inside, other=NEVER)
    masses = tl.load(mass_ptr + slot[:, None] * BLOCK_D + row[None, :], mask=inside, other=0.0)
    position = (slot[:, None, None] * BLOCK_D + row[None, :, None]) * BLOCK_D + offset_d[None, None, :]
    contexts = tl.load(context_ptr + position, mask=inside[:, :, None], other=0.0)
    peak = tl.max(peaks, axis=0)
    share = tl.exp(peaks - peak[None, :])
    mass = tl.sum(share * masses, axis=0)
    context = tl.sum(share[:, :, None] * contexts, axis=0)
    some = (mass > 0) & (row < HEAD_DIM)
    mass = tl.where(some, mass, 1.0)
    context = tl.where(some[:, None], context / mass[:, None], 0.0)
    log_mass_ptr += summary * 3 * BLOCK_D + row
    tl.store(log_mass_ptr, tl.where(some, peak + tl.log(mass), NEVER))
    tl.store(log_mass_ptr + BLOCK_D, tl.where(some, peak, 0.0))
    tl.store(log_mass_ptr + 2 * BLOCK_D, tl.where(some, 1.0 / mass, 0.0))
    tl.store(out_context_ptr + (summary * BLOCK_D + row[:, None]) * BLOCK_D + offset_d[None, :], context)


@triton.jit
def merge_gradients_kernel(
    grad_context_slot_ptr, grad_mass_slot_ptr,  # slots (B·H, splits, R', …), R' ≥ R
    context_ptr, mix_ptr,  # (B·H·R, D', D'); (H, D) weights of the output, with HAS_MIX
    grad_context_ptr, shift_ptr, grad_mix_ptr,  # (B·H·R, D', D'), (B·H·R, D'), (B·H, row blocks, D')
    splits, num_heads,
    HAS_MIX: tl.constexpr, R: tl.constexpr, SLOT_R: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """dC, and dλ − ρ with ρ_l = dC_l · C_l, of ROWS features of one summary.

    dC is rounded as the product that reads it will round it, so that ρ cancels against the rounded values. With
    HAS_MIX the slots hold Aᵀ do of the unweighted do: the weights w enter here, and dw_d = Σ_l C_ld (Aᵀ do)_ld.
    """
    summary = tl.program_id(0).to(tl.int64)
    offset_s, offset_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (offset_s < splits)[:, None]
    slot = ((summary // R) * splits + offset_s) * SLOT_R + summary % R
    grad_mass = tl.sum(
        tl.load(grad_mass_slot_ptr + slot[:, None] * BLOCK_D + row[None, :], mask=inside, other=0.0), axis=0
    )
    position = (slot[:, None, None] * BLOCK_D + row[None, :, None]) * BLOCK_D + offset_d[None, None, :]
    grad_context = tl.sum(tl.load(grad_context_slot_ptr + position, mask=inside[:, :, None], other=0.0), axis=0)
    state = (summary * BLOCK_D + row[:, None]) * BLOCK_D + offset_d[None, :]
    context = tl.load(context_ptr + state)
    if HAS_MIX:
        grad_mix = tl.sum(context * grad_context, axis=0)
        block = summary * tl.num_programs(1) + tl.program_id(1)
        tl.store(grad_mix_ptr + block * BLOCK_D + offset_d, grad_mix)
        weight = tl.load(mix_ptr + (summary % num_heads) * HEAD_DIM + offset_d, mask=offset_d < HEAD_DIM, other=0.0)
        grad_context *= weight[None, :]
    grad_context = grad_context.to(OPERAND).to(COMPUTE)
    tl.store(grad_context_ptr + state, grad_context)
    tl.store(shift_ptr + summary * BLOCK_D + row, grad_mass - tl.sum(grad_context * context, axis=1))


@triton.jit
def key_gradients(
    k, v, weight, beta, peak, scale, grad_context, shift, RATE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile from one resolution: B = exp(ℓ − λ), dv' = B dC, dk' = β B (v' dCᵀ + dλ − ρ).

    B is taken as exp(ℓ − peak) · scale: the rounding of a large λ would cost it digits. A token has its share of its
    window's gradient, which is its weight in the mean.
    """
    fused = window_mean(k, weight, RATE, BLOCK_N, BLOCK_D)
    feature = tl.exp(tl.minimum(beta * fused - peak[None, :], 0.0)) * scale[None, :]
    reading = product(v, tl.trans(grad_context), COMPUTE, OPERAND, PRECISION)
    reading = window_mean(reading, weight, RATE, BLOCK_N, BLOCK_D)
    grad_k = beta * feature * (reading + shift[None, :])
    grad_v = product(feature, grad_context, COMPUTE, OPERAND, PRECISION)
    return grad_k * weight[:, None], grad_v * weight[:, None]


@triton.jit
def keys_backward_kernel(
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    beta_ptr, log_mass_ptr, grad_context_ptr, shift_ptr,  # (R,), (B·H, R, …)
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    length, num_heads, splits, chunk,
    RATES: tl.constexpr, R: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one part of a head; every element has one owner."""
    b, h, part = place(tl.program_id(0), num_heads, splits)
    k_ptr += b * k_b + h.to(tl.int64) * k_h
    v_ptr += b * v_b + h.to(tl.int64) * v_h
    grad_k_ptr += b * gk_b + h.to(tl.int64) * gk_h
    grad_v_ptr += b * gv_b + h.to(tl.int64) * gv_h
    mask_ptr += b * mask_b
    state = (b * num_heads + h) * R
    offset_n, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    square = offset_d[:, None] * BLOCK_D + offset_d[None, :]
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        k = load_rows(k_ptr, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
        v = load_rows(v_ptr, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        grad_k = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        grad_v = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for r in tl.static_range(R):
            weight = window_weights(real, RATES[r], BLOCK_N, COMPUTE)
            beta = tl.load(beta_ptr + r).to(COMPUTE)
            peak = tl.load(log_mass_ptr + ((state + r) * 3 + 1) * BLOCK_D + offset_d)
            scale = tl.load(log_mass_ptr + ((state + r) * 3 + 2) * BLOCK_D + offset_d)
            grad_context = tl.load(grad_context_ptr + (state + r) * BLOCK_D * BLOCK_D + square)
            shift = tl.load(shift_ptr + (state + r) * BLOCK_D + offset_d)
            from_k, from_v = key_gradients(
                k, v, weight, beta, peak, scale, grad_context, shift, RATES[r], BLOCK_N, BLOCK_D,
                COMPUTE, OPERAND, PRECISION,
            )  # fmt: skip
            grad_k += from_k
            grad_v += from_v
        keep = start + offset_n < length
        store_rows(grad_k_ptr, gk_n, start, offset_n, keep, grad_k, HEAD_DIM, BLOCK_D)
        store_rows(grad_v_ptr, gv_n, start, offset_n, keep, grad_v, HEAD_DIM, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ launches


def row_block(width: int) -> int:
    """Features that one program of a merge handles: about 128 numbers of every slot."""
    return max(1, 128 // width)


def summarise(
    k: Tensor, v: Tensor, key_mask: Tensor | None, beta: Tensor, rates: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Context C (B·H·R, D', D') and log-mass (B·H·R, 3, D') of the keys at every rate; D' is the padded D.

    The three are λ, the column maximum of ℓ, and exp(maximum − λ).
    """
    batch, heads, length, dim = k.shape
    width, kinds, count = block_dim(dim), arithmetic(k.dtype), len(rates)
    options = dict(dtype=state_dtype(k.dtype), device=k.device)
    config = SUMMARY[width].fit(rates)
    splits, chunk = split(length, config.rows, batch * heads * count)
    slots, summaries = batch * heads * count * splits, batch * heads * count
    peak, mass = torch.empty(slots, width, **options), torch.empty(slots, width, **options)
    partial = torch.empty(slots, width, width, **options)
    summarise_kernel[(slots,)](
        k, *strides(k), v, *strides(v), *mask_arguments(key_mask, k), beta, peak, mass, partial,
        length, heads, splits, chunk,
        RATES=rates, R=count, HAS_MASK=key_mask is not None, HEAD_DIM=dim, BLOCK_N=config.rows, BLOCK_D=width,
        **kinds, **config.options,
    )  # fmt: skip
    context, log_mass = torch.empty(summaries, width, width, **options), torch.empty(summaries, 3, width, **options)
    rows = row_block(width)
    merge_summaries_kernel[(summaries, width // rows)](
        peak, mass, partial, context, log_mass, splits,
        HEAD_DIM=dim, BLOCK_S=triton.next_power_of_2(splits), ROWS=rows, BLOCK_D=width, COMPUTE=kinds["COMPUTE"],
        num_warps=4,
    )  # fmt: skip
    return context, log_mass


def merge_gradients(
    grad_context: Tensor, grad_mass: Tensor, context: Tensor, mix: Tensor | None, shape: torch.Size,
    dtype: torch.dtype, count: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dC and dλ − ρ of every summary from slots (B·H, splits, R', D', D'), and the gradient of `mix` (H, D)."""
    batch, heads, _, dim = shape
    _, splits, slot_count, width, _ = grad_context.shape
    kinds, rows = arithmetic(dtype), row_block(width)
    merged, shift = torch.empty_like(context), context.new_empty(context.shape[:2])
    grad_mix = context.new_empty(batch, heads, width // rows, width) if mix is not None else None
    merge_gradients_kernel[(len(context), width // rows)](
        grad_context, grad_mass, context, context if mix is None else mix,
        merged, shift, merged if grad_mix is None else grad_mix, splits, heads,
        HAS_MIX=mix is not None, R=count, SLOT_R=slot_count, HEAD_DIM=dim,
        BLOCK_S=triton.next_power_of_2(splits), ROWS=rows, BLOCK_D=width,
        COMPUTE=kinds["COMPUTE"], OPERAND=kinds["OPERAND"], num_warps=4,
    )  # fmt: skip
    return merged, shift, None if grad_mix is None else grad_mix.sum((0, 2))[:, :dim].contiguous()


def keys_backward(
    k: Tensor, v: Tensor, key_mask: Tensor | None, beta: Tensor, log_mass: Tensor, grad_context: Tensor, shift: Tensor,
    rates: tuple[int, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv, in the layout of k and v."""
    batch, heads, length, dim = k.shape
    width = block_dim(dim)
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    config = (BACKWARD if rates == (1,) else BACKWARD_RATES)[width].fit(rates)
    splits, chunk = split(length, config.rows, batch * heads)
    keys_backward_kernel[(batch * heads * splits,)](
        k, *strides(k), v, *strides(v), *mask_arguments(key_mask, k), beta, log_mass, grad_context, shift,
        grad_k, *strides(grad_k), grad_v, *strides(grad_v), length, heads, splits, chunk,
        RATES=rates, R=len(rates), HAS_MASK=key_mask is not None, HEAD_DIM=dim, BLOCK_N=config.rows, BLOCK_D=width,
        **arithmetic(k.dtype), **config.options,
    )  # fmt: skip
    return grad_k, grad_v
