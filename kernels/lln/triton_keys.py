"""The key side of LLN and AdaMRA: the summary of (fused) keys and values, and its backward pass.

With ℓ_w = β k'_w, where k'_w and v'_w are the means of a window of RATE tokens (RATE = 1: the token itself),

    λ_l = ln Σ_w exp ℓ_wl,   C_l = Σ_w exp(ℓ_wl − λ_l) v'_w

Only keys are fused. A weight exp(ℓ − λ) / |w| is given to every token of its window, so that values enter the products
as they were read, unrounded. All rates are taken in one pass, each from the sums of the rate before. Nothing that is
exponentiated exceeds zero. Parts of a sequence write to slots of their own, which `triton_merge` merges.

Floor, in touches of one (B, H, N, D) tensor: summary 2 (k, v), backward 4 (k, v, dk, dv).
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005  (Triton's tuples grow by +; it knows no unpacking)

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import COUNTS, Config, arithmetic, block_dim, mask_arguments, split, state_dtype, strides
from kernels.common.tiles import NEVER, exponential, load_rows, place, product, real_rows, store_rows, widened
from kernels.lln.triton_merge import Slots, merge_summaries
from kernels.lln.triton_windows import (
    full,
    rows_loaded,
    shares_of_windows,
    window_shares,
    window_spread,
    window_starts,
    window_sums,
    windows,
)  # fmt: skip

# By padded head dimension. Fixed, never tuned at run time: a choice by length would re-tune in the middle of training.
SUMMARY = {16: Config(128, 2, 2), 32: Config(128, 2, 2), 64: Config(64, 4, 2), 128: Config(64, 8, 2)}
BACKWARD = {16: Config(64, 4, 2), 32: Config(64, 4, 2), 64: Config(64, 4, 2), 128: Config(64, 8, 1)}

# The same at several rates.
SUMMARY_RATES = {16: Config(64, 2, 3), 32: Config(64, 2, 3), 64: Config(64, 4, 3), 128: Config(64, 16, 1)}
BACKWARD_RATES = {16: Config(64, 2, 3), 32: Config(64, 2, 3), 64: Config(32, 4, 2), 128: Config(64, 16, 1)}

LOWEST = tl.constexpr(-1e29)
"""Running maximum before any real key: above NEVER, so that a padded key weighs exp(NEVER − LOWEST) = 0."""

WIDEST_HELD = tl.constexpr(64)
"""Widest head whose states, of all resolutions, a program holds while it passes over tiles."""

ONES = tl.constexpr(16)
"""Columns of ones that sum the weights on the tensor cores: the fewest that a product takes."""


@triton.jit
def highest_logits(
    k_ptr, k_n, mask_ptr, mask_n, share_ptr, share_r, beta_ptr, first, last, length,
    LEVELS: tl.constexpr, ORDER: tl.constexpr, R: tl.constexpr, PHASES: tl.constexpr, HAS_MASK: tl.constexpr,
    FULL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """max_w ℓ_wl of the tokens first … last of a head at every rate, (BLOCK_D,) each."""
    offset_n, peaks = window_starts(1, BLOCK_N, PHASES), ()
    for r in tl.static_range(R):
        peaks = peaks + (tl.full((BLOCK_N // max(LEVELS[r + 1], PHASES), BLOCK_D), LOWEST, COMPUTE),)
    for start in range(first, last, BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK, FULL)
        sums = load_rows(k_ptr, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
        higher = ()
        for r in tl.static_range(R):
            sums = window_sums(sums, LEVELS[r], LEVELS[r + 1], BLOCK_N, BLOCK_D, PHASES)
            share = window_shares(
                mask_ptr, mask_n, share_ptr + r * share_r, start, length,
                LEVELS[r + 1], HAS_MASK, BLOCK_N, PHASES, COMPUTE, FULL,
            )  # fmt: skip
            none = tl.where(share > 0, 0.0, NEVER).to(COMPUTE)
            fused = sums * share[:, None] + none[:, None]
            fused = tl.reshape(fused, (max(PHASES // LEVELS[r + 1], 1), BLOCK_N // max(LEVELS[r + 1], PHASES), BLOCK_D))
            higher = higher + (tl.maximum(peaks[r], tl.max(fused, axis=0)),)
        peaks = higher
    highest = ()
    for r in tl.static_range(R):
        beta = tl.load(beta_ptr + ORDER[r]).to(COMPUTE)
        highest = highest + (tl.maximum(tl.max(peaks[r], axis=0) * beta, LOWEST),)
    return highest


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def summarise_kernel(
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    share_ptr, share_r, share_b,
    beta_ptr,  # (R,)
    peak_ptr, mass_ptr, context_ptr,  # slots (B·H, R, splits, …)
    length, num_heads, splits, chunk,
    LEVELS: tl.constexpr, ORDER: tl.constexpr, R: tl.constexpr, PHASES: tl.constexpr, HAS_MASK: tl.constexpr,
    FULL: tl.constexpr, LOADED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Summary of one part of a head at every rate, each relative to its own column maximum.

    The maxima come from a first pass over the part's keys, which the second then finds in cache: cheaper than to
    reduce, compare and rescale at every tile. It has LOADED phases, as no product asks it for another layout. LEVELS
    are 1 and the rates in rising order; the i-th rate is resolution ORDER[i].
    """
    b, h, part = place(tl.program_id(0), num_heads, splits)
    k_ptr += b * k_b + h.to(tl.int64) * k_h
    v_ptr += b * v_b + h.to(tl.int64) * v_h
    mask_ptr += b * mask_b
    share_ptr += b * share_b
    first, last = part * chunk, tl.minimum((part + 1) * chunk, length)
    peaks = highest_logits(
        k_ptr, k_n, mask_ptr, mask_n, share_ptr, share_r, beta_ptr, first, last, length,
        LEVELS, ORDER, R, LOADED, HAS_MASK, FULL, HEAD_DIM, BLOCK_N, BLOCK_D, COMPUTE,
    )  # fmt: skip
    offset_n, offset_d = window_starts(1, BLOCK_N, PHASES), tl.arange(0, BLOCK_D)
    masses, contexts = (), ()
    for _r in tl.static_range(R):
        masses = masses + (tl.zeros((BLOCK_D, ONES), COMPUTE),)
        contexts = contexts + (tl.zeros((BLOCK_D, BLOCK_D), COMPUTE),)
    for start in range(first, last, BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK, FULL)
        k = load_rows(k_ptr, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        sums = widened(k, BLOCK_D, COMPUTE, OPERAND, PRECISION)
        v = load_rows(v_ptr, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        ones = tl.broadcast_to(tl.where(real, 1.0, 0.0).to(OPERAND)[:, None], (BLOCK_N, ONES))
        new_masses, new_contexts = (), ()
        for r in tl.static_range(R):
            sums = window_sums(sums, LEVELS[r], LEVELS[r + 1], BLOCK_N, BLOCK_D, PHASES)
            share = window_shares(
                mask_ptr, mask_n, share_ptr + r * share_r, start, length,
                LEVELS[r + 1], HAS_MASK, BLOCK_N, PHASES, COMPUTE, FULL,
            )  # fmt: skip
            beta = tl.load(beta_ptr + ORDER[r]).to(COMPUTE)
            none = tl.where(share > 0, 0.0, NEVER).to(COMPUTE)
            if LEVELS[r + 1] == 1:  # its share is 1; without a token there is no weight
                weights = exponential(sums * beta + none[:, None], peaks[r][None, :], PRECISION)
                features = weights
            else:
                logits = sums * (share * beta)[:, None] + none[:, None]
                weights = exponential(logits, peaks[r][None, :], PRECISION)
                features = weights * share[:, None]
            spread = window_spread(features.to(OPERAND), LEVELS[r + 1], 1, BLOCK_N, BLOCK_D, PHASES)
            context = contexts[r] + product(tl.trans(spread), v, COMPUTE, OPERAND, PRECISION)
            if PRECISION == "ieee":  # by fewer and better sums than those of a product
                mass = masses[r] + tl.sum(weights, axis=0)[:, None]
            else:  # of the weights as they were rounded
                mass = masses[r] + product(tl.trans(spread), ones, COMPUTE, OPERAND, PRECISION)
            new_masses, new_contexts = new_masses + (mass,), new_contexts + (context,)
        masses, contexts = new_masses, new_contexts
    for r in tl.static_range(R):
        slot = ((b * num_heads + h) * R + ORDER[r]) * splits + part
        tl.store(peak_ptr + slot * BLOCK_D + offset_d, peaks[r])
        tl.store(mass_ptr + slot * BLOCK_D + offset_d, tl.max(masses[r], axis=1))  # the columns are equal
        square = (slot * BLOCK_D + offset_d[:, None]) * BLOCK_D + offset_d[None, :]
        tl.store(context_ptr + square, contexts[r])


@triton.jit
def key_weights(logits, peak, scale, PRECISION: tl.constexpr):
    """B = exp(ℓ − λ) as exp(ℓ − peak) · scale: the rounding of a large λ would cost it digits."""
    return exponential(tl.minimum(logits, peak[None, :]), peak[None, :], PRECISION) * scale[None, :]


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def keys_backward_kernel(
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    share_ptr, share_r, share_b,
    beta_ptr, log_mass_ptr, grad_context_ptr, shift_ptr,  # (R,), (B·H, R, …)
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    length, num_heads, splits, chunk,
    LEVELS: tl.constexpr, ORDER: tl.constexpr, R: tl.constexpr, PHASES: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one part of a head; every element has one owner.

    dv' = B dC, dk' = β B (v' dCᵀ + shift), and a token has 1/|w| of what its window has.
    """
    b, h, part = place(tl.program_id(0), num_heads, splits)
    k_ptr += b * k_b + h.to(tl.int64) * k_h
    v_ptr += b * v_b + h.to(tl.int64) * v_h
    grad_k_ptr += b * gk_b + h.to(tl.int64) * gk_h
    grad_v_ptr += b * gv_b + h.to(tl.int64) * gv_h
    mask_ptr += b * mask_b
    share_ptr += b * share_b
    state = (b * num_heads + h) * R
    offset_n, offset_d = window_starts(1, BLOCK_N, PHASES), tl.arange(0, BLOCK_D)
    square = offset_d[:, None] * BLOCK_D + offset_d[None, :]
    grad_contexts = ()
    if BLOCK_D <= WIDEST_HELD:
        for r in tl.static_range(R):
            held = tl.load(grad_context_ptr + (state + ORDER[r]) * BLOCK_D * BLOCK_D + square)
            grad_contexts = grad_contexts + (held.to(OPERAND),)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        k = load_rows(k_ptr, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        sums = widened(k, BLOCK_D, COMPUTE, OPERAND, PRECISION)
        v = load_rows(v_ptr, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        grad_v = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        parts = ()
        for r in tl.static_range(R):
            summary = state + ORDER[r]
            beta = tl.load(beta_ptr + ORDER[r]).to(COMPUTE)
            peak = tl.load(log_mass_ptr + (summary * 3 + 1) * BLOCK_D + offset_d)
            scale = tl.load(log_mass_ptr + (summary * 3 + 2) * BLOCK_D + offset_d)
            shift = tl.load(shift_ptr + summary * BLOCK_D + offset_d)
            sums = window_sums(sums, LEVELS[r], LEVELS[r + 1], BLOCK_N, BLOCK_D, PHASES)
            share = window_shares(
                mask_ptr, mask_n, share_ptr + r * share_r, start, length,
                LEVELS[r + 1], HAS_MASK, BLOCK_N, PHASES, COMPUTE,
            )  # fmt: skip
            weights = key_weights(sums * (share * beta)[:, None], peak, scale, PRECISION) * share[:, None]
            if BLOCK_D <= WIDEST_HELD:
                grad_context = grad_contexts[r]
            else:
                grad_context = tl.load(grad_context_ptr + summary * BLOCK_D * BLOCK_D + square).to(OPERAND)
            if PRECISION == "ieee":  # of fused values, as plain PyTorch: a sum of rounded products would be worse
                fused = window_sums(v, 1, LEVELS[r + 1], BLOCK_N, BLOCK_D, PHASES) * share[:, None]
                fused = window_spread(fused, LEVELS[r + 1], 1, BLOCK_N, BLOCK_D, PHASES)
                reading = product(fused, tl.trans(grad_context), COMPUTE, OPERAND, PRECISION)
                reading = window_sums(reading, 1, LEVELS[r + 1], BLOCK_N, BLOCK_D, PHASES, True)  # all are equal
            else:
                reading = product(v, tl.trans(grad_context), COMPUTE, OPERAND, PRECISION)
                reading = window_sums(reading, 1, LEVELS[r + 1], BLOCK_N, BLOCK_D, PHASES) * share[:, None]
            parts = parts + (beta * weights * (reading + shift[None, :]),)
            weights = window_spread(weights.to(OPERAND), LEVELS[r + 1], 1, BLOCK_N, BLOCK_D, PHASES)
            grad_v += product(weights, grad_context, COMPUTE, OPERAND, PRECISION)
        grad_k = parts[R - 1]
        for r in tl.static_range(R - 1):
            grad_k = window_spread(grad_k, LEVELS[R - r], LEVELS[R - r - 1], BLOCK_N, BLOCK_D, PHASES)
            grad_k += parts[R - r - 2]
        grad_k = window_spread(grad_k, LEVELS[1], 1, BLOCK_N, BLOCK_D, PHASES)
        if HAS_MASK:
            grad_k = tl.where(real[:, None], grad_k, 0.0)
            grad_v = tl.where(real[:, None], grad_v, 0.0)
        keep = start + offset_n < length
        store_rows(grad_k_ptr, gk_n, start, offset_n, keep, grad_k, HEAD_DIM, BLOCK_D)
        store_rows(grad_v_ptr, gv_n, start, offset_n, keep, grad_v, HEAD_DIM, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ launches


def summarise_parts(k: Tensor, v: Tensor, key_mask: Tensor | None, beta: Tensor, rates: tuple[int, ...]) -> Slots:
    """The keys at every rate, part by part."""
    batch, heads, length, dim = k.shape
    width, count = block_dim(dim), len(rates)
    options = dict(dtype=state_dtype(k.dtype), device=k.device)
    config = (SUMMARY if rates == (1,) else SUMMARY_RATES)[width].fit(rates)
    splits, chunk = split(length, config.rows, batch * heads)
    shape = (batch * heads * count, splits, width)
    slots = Slots(*(torch.empty(*shape, *more, **options) for more in ((), (), (width,))))
    summarise_kernel[(batch * heads * splits,)](
        k, *strides(k), v, *strides(v), *mask_arguments(key_mask, k), *shares_of_windows(key_mask, rates, k),
        beta, *slots, length, heads, splits, chunk, **windows(rates, config),
        HAS_MASK=key_mask is not None, FULL=full(key_mask, length, config), LOADED=rows_loaded(config, width, k.dtype),
        HEAD_DIM=dim, BLOCK_N=config.rows, BLOCK_D=width,
        **arithmetic(k.dtype), **config.options,
    )  # fmt: skip
    return slots


def summarise(
    k: Tensor, v: Tensor, key_mask: Tensor | None, beta: Tensor, rates: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """C and λ of the keys at every rate, as in `Slots.merged`."""
    return merge_summaries(summarise_parts(k, v, key_mask, beta, rates), k.shape[-1])


def keys_backward(
    k: Tensor, v: Tensor, key_mask: Tensor | None, beta: Tensor, log_mass: Tensor, grad_context: Tensor, shift: Tensor,
    rates: tuple[int, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv, in the layout of k and v."""
    grads, programs, arguments, options = keys_backward_launch(
        k, v, key_mask, beta, log_mass, grad_context, shift, rates
    )
    keys_backward_kernel[(programs,)](*arguments, **options)
    return grads


def keys_backward_launch(
    k: Tensor, v: Tensor, key_mask: Tensor | None, beta: Tensor, log_mass: Tensor, grad_context: Tensor, shift: Tensor,
    rates: tuple[int, ...],
) -> tuple[tuple[Tensor, Tensor], int, tuple, dict]:  # fmt: skip
    """dk and dv, yet to be written by `keys_backward_kernel`: its programs, arguments, and constants and options."""
    batch, heads, length, dim = k.shape
    width = block_dim(dim)
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    config = (BACKWARD if rates == (1,) else BACKWARD_RATES)[width].fit(rates)
    splits, chunk = split(length, config.rows, batch * heads)
    arguments = (
        k, *strides(k), v, *strides(v), *mask_arguments(key_mask, k), *shares_of_windows(key_mask, rates, k),
        beta, log_mass, grad_context, shift,
        grad_k, *strides(grad_k), grad_v, *strides(grad_v), length, heads, splits, chunk,
    )  # fmt: skip
    options = dict(
        **windows(rates, config), HAS_MASK=key_mask is not None, HEAD_DIM=dim, BLOCK_N=config.rows, BLOCK_D=width,
        **arithmetic(k.dtype), **config.options,
    )  # fmt: skip
    return (grad_k, grad_v), batch * heads * splits, arguments, options
