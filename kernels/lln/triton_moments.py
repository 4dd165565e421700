"""Spreads of queries and (fused) keys and the scales they give, in two launches and without a host round trip.

Floor: two touches, q and k read once. A partial is (count, mean, Σ(x − mean)²), which merges without the cancellation
of sums of squares; the last merge runs in float64. What bounds the pass besides is arithmetic: where every token of
every tile is real (FULL) it does without weights and selects, and half of its instructions.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005  (Triton's tuples grow by +; it knows no unpacking)

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import (
    COUNTS,
    Config,
    arithmetic,
    block_dim,
    mask_arguments,
    split,
    state_dtype,
    strides,
    unit_last_stride,
)
from kernels.common.tiles import load_rows, place, real_rows
from kernels.lln.moments import SMALLEST_SPREAD
from kernels.lln.triton_windows import (
    full,
    rows_loaded,
    shares_of_windows,
    window_shares,
    window_starts,
    window_sums,
    windows,
)

# Loads go straight to registers, a tile at once, which needs neither a pipeline nor a barrier; at 128 registers all
# programs of a call run side by side.
TILES = {
    16: Config(128, 2, 1, 128),
    32: Config(128, 2, 1, 128),
    64: Config(128, 4, 1, 128),
    128: Config(128, 8, 1, 128),
}

SLOTS = 1024
"""Partials that the finishing program reads at once."""


@triton.jit
def update(x, share, seen, mean, square, GROUPS: tl.constexpr, FULL: tl.constexpr):
    """Count, mean and Σ(x − mean)² of every position after one more tile x (rows, columns), none where `share` is 0.

    A position is a column of a row; rows apart by 1 / GROUPS of the tile share it and lie in one thread, so that a tile
    costs a sum, a difference and a square an element, and no sum across threads. With FULL all count, and `seen` is one
    number for all rows.
    """
    ROWS: tl.constexpr = x.shape[0] // GROUPS
    x = tl.reshape(x, (GROUPS, ROWS, x.shape[1]))
    if FULL:
        count = tl.full((1,), GROUPS, x.dtype)
    else:
        count = tl.sum(tl.reshape(tl.where(share > 0, 1.0, 0.0).to(x.dtype), (GROUPS, ROWS)), axis=0)
    middle = tl.sum(x, axis=0) * (1.0 / tl.maximum(count, 1.0))[:, None]
    delta = x - middle[None, :, :]
    if not FULL:
        delta = tl.where(tl.reshape((share > 0)[:, None], (GROUPS, ROWS, 1)), delta, 0.0)
    apart = middle - mean
    part = count / tl.maximum(seen + count, 1.0)
    square += tl.sum(delta * delta, axis=0) + apart * apart * (seen * part)[:, None]
    return seen + count, mean + apart * part[:, None], square


@triton.jit
def store_moments(ptr, slots, seen, mean, square, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Count, mean and Σ(x − mean)² of one part from those of its positions; columns of padding hold zeros."""
    count = tl.sum(seen) * (mean.shape[0] // seen.shape[0] * HEAD_DIM)
    middle = tl.sum(mean * seen[:, None]) / tl.maximum(count, 1.0)
    inside = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    apart = tl.where(inside, mean - middle, 0.0)
    tl.store(ptr, count)
    tl.store(ptr + slots, middle)
    tl.store(ptr + 2 * slots, tl.sum(square + apart * apart * seen[:, None]))


@triton.jit
def tensor_moments(
    ptr, stride_n, mask_ptr, mask_n, share_ptr, share_r, slot_ptr, slots, first, last, length,
    LEVELS: tl.constexpr, ORDER: tl.constexpr, R: tl.constexpr, PHASES: tl.constexpr, HAS_MASK: tl.constexpr,
    FULL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Moments of the tokens first … last of a head, fused at every rate; stream ORDER[i] is that of LEVELS[i + 1]."""
    offset_n = window_starts(1, BLOCK_N, PHASES)
    seen, means, squares = (), (), ()
    for r in tl.static_range(R):
        zero = tl.zeros((BLOCK_N // max(LEVELS[r + 1], PHASES), BLOCK_D), COMPUTE)
        seen = seen + (tl.zeros((1 if FULL else zero.shape[0],), COMPUTE),)
        means, squares = means + (zero,), squares + (zero,)
    for start in range(first, last, BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK, FULL)
        sums = load_rows(ptr, stride_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
        new_seen, new_means, new_squares = (), (), ()
        for r in tl.static_range(R):
            sums = window_sums(sums, LEVELS[r], LEVELS[r + 1], BLOCK_N, BLOCK_D, PHASES)
            share = window_shares(
                mask_ptr, mask_n, share_ptr + r * share_r, start, length,
                LEVELS[r + 1], HAS_MASK, BLOCK_N, PHASES, COMPUTE, FULL,
            )  # fmt: skip
            fused = sums if LEVELS[r + 1] == 1 else sums * share[:, None]  # the share of a token alone is 1
            n, mean, square = update(
                fused, share, seen[r], means[r], squares[r], max(PHASES // LEVELS[r + 1], 1), FULL
            )  # fmt: skip
            new_seen, new_means, new_squares = new_seen + (n,), new_means + (mean,), new_squares + (square,)
        seen, means, squares = new_seen, new_means, new_squares
    for r in tl.static_range(R):
        stream = slot_ptr + tl.cast(ORDER[r], tl.int64) * 3 * slots
        store_moments(stream, slots, seen[r], means[r], squares[r], HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def partial_moments_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    mask_ptr, mask_b, mask_n,
    share_ptr, share_r, share_b,
    slot_ptr,  # (1 + R, 3, slots): q, then k at each rate
    length, num_heads, splits, chunk, slots,
    LEVELS: tl.constexpr, ORDER: tl.constexpr, R: tl.constexpr, PHASES: tl.constexpr, HAS_MASK: tl.constexpr,
    FULL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Moments of one part of a head: of its queries, or, in the second half of programs, of its keys at every rate."""
    pid = tl.program_id(0)
    b, h, part = place(pid, num_heads, splits)
    mask_ptr += b * mask_b
    share_ptr += b * share_b
    slot_ptr += pid
    first, last = part * chunk, tl.minimum((part + 1) * chunk, length)
    if tl.program_id(1) == 0:
        tensor_moments(
            q_ptr + b * q_b + h.to(tl.int64) * q_h, q_n, mask_ptr, mask_n, share_ptr, share_r, slot_ptr, slots,
            first, last, length,
            (1, 1), (0,), 1, PHASES, HAS_MASK, FULL, HEAD_DIM, BLOCK_N, BLOCK_D, COMPUTE,
        )  # fmt: skip
    else:
        tensor_moments(
            k_ptr + b * k_b + h.to(tl.int64) * k_h, k_n, mask_ptr, mask_n, share_ptr, share_r,
            slot_ptr + 3 * tl.cast(slots, tl.int64), slots, first, last, length,
            LEVELS, ORDER, R, PHASES, HAS_MASK, FULL, HEAD_DIM, BLOCK_N, BLOCK_D, COMPUTE,
        )  # fmt: skip


@triton.jit
def times(a, b):
    return a * b


@triton.jit
def merged_spreads(slot_ptr, stream, slots, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    """σ in float64 of every `stream` (2,) from its partials: unbiased, ≥ SMALLEST, 1 for fewer than two entries.

    One pass, in which every position of BLOCK merges its own partials, by the rule that merges the positions after it.
    """
    offset = tl.arange(0, BLOCK)[None, :]
    slot_ptr += stream.to(tl.int64)[:, None] * 3 * slots + offset
    inside = offset < slots
    count = tl.load(slot_ptr, mask=inside, other=0.0).to(tl.float64)
    mean = tl.load(slot_ptr + slots, mask=inside, other=0.0).to(tl.float64)
    square = tl.load(slot_ptr + 2 * slots, mask=inside, other=0.0).to(tl.float64)
    for first in range(BLOCK, slots, BLOCK):
        inside = first + offset < slots
        n = tl.load(slot_ptr + first, mask=inside, other=0.0).to(tl.float64)
        delta = tl.load(slot_ptr + slots + first, mask=inside, other=0.0).to(tl.float64) - mean
        share = n / tl.maximum(count + n, 1.0)
        square += tl.load(slot_ptr + 2 * slots + first, mask=inside, other=0.0).to(tl.float64)
        square += delta * delta * count * share
        mean += delta * share
        count += n
    entries = tl.sum(count, axis=1)
    delta = mean - (tl.sum(count * mean, axis=1) / tl.maximum(entries, 1.0))[:, None]
    total = tl.sum(square + count * delta * delta, axis=1)
    sigma = tl.maximum(tl.sqrt(total / tl.maximum(entries - 1.0, 1.0)), SMALLEST)
    return tl.where(entries > 1.0, sigma, 1.0)


@triton.jit
def match_moments_kernel(
    slot_ptr, out_ptr, slots,
    CONSTANT_A: tl.constexpr, CONSTANT_B: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(σq, σk, α, β) of resolution r = program_id: `kernels.lln.moments.match_moments` on the device."""
    r, rates = tl.program_id(0), tl.num_programs(0)
    side = tl.arange(0, 2)  # queries, keys
    sigma = merged_spreads(slot_ptr, side * (r + 1), slots, SMALLEST, BLOCK)
    product = tl.reduce(sigma, 0, times)
    s = tl.sqrt((product * product - CONSTANT_B) / (2.0 * CONSTANT_A))
    out_ptr += side * rates + r
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr, sigma.to(kind))
    tl.store(out_ptr + 2 * rates, (s / sigma).to(kind))


def moments(q: Tensor, k: Tensor, key_mask: Tensor | None, rates: list[int], a: float, b: float) -> Tensor:
    """(4, R): σ of the real queries, of the keys fused at each rate, and α, β for the constants (a, b)."""
    q, k = unit_last_stride(q), unit_last_stride(k)
    batch, heads, length, dim = q.shape
    width = block_dim(dim)
    config = TILES[width].fit(tuple(rates))
    phases = rows_loaded(config, width, q.dtype)
    splits, chunk = split(length, config.rows, batch * heads)
    slots = batch * heads * splits
    partial = torch.empty(1 + len(rates), 3, slots, dtype=state_dtype(q.dtype), device=q.device)
    out = torch.empty(4, len(rates), dtype=state_dtype(q.dtype), device=q.device)
    partial_moments_kernel[(slots, 2)](
        q, *strides(q), k, *strides(k), *mask_arguments(key_mask, q),
        *shares_of_windows(key_mask, tuple(rates), q), partial,
        length, heads, splits, chunk, slots, **{**windows(tuple(rates), config), "PHASES": phases},
        HAS_MASK=key_mask is not None, FULL=full(key_mask, length, config), HEAD_DIM=dim,
        BLOCK_N=config.rows, BLOCK_D=width, COMPUTE=arithmetic(q.dtype)["COMPUTE"], **config.options,
    )  # fmt: skip
    block = min(SLOTS, triton.next_power_of_2(slots))
    match_moments_kernel[(len(rates),)](
        partial, out, slots, CONSTANT_A=a, CONSTANT_B=b, SMALLEST=SMALLEST_SPREAD, BLOCK=block, num_warps=4
    )
    return out
