"""Spreads of queries and (fused) keys and the scales they give, in two launches and without a host round trip.

Floor: two touches, q and k read once. A partial is (count, mean, Σ(x − mean)²), which merges without the cancellation
of sums of squares; the merge runs in float64.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import arithmetic, block_dim, mask_arguments, split, state_dtype, strides, unit_last_stride
from kernels.common.tiles import load_rows, place, real_rows, window_mean, window_weights
from kernels.lln.moments import SMALLEST_SPREAD

SLOTS = 1024
"""Partials that the finishing program reads at once."""


@triton.jit
def tile_moments(x, keep, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):
    """Count, mean and Σ(x − mean)² of the rows of x that `keep` names; columns of padding hold zeros."""
    count = tl.sum(tl.where(keep, 1.0, 0.0).to(COMPUTE)) * HEAD_DIM
    mean = tl.sum(tl.where(keep[:, None], x, 0.0)) / tl.maximum(count, 1.0)
    inside = keep[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    centred = tl.where(inside, x - mean, 0.0)
    return count, mean, tl.sum(centred * centred)


@triton.jit
def partial_moments_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    mask_ptr, mask_b, mask_n,
    slot_ptr,  # (1 + R, 3, slots): q, then k at each rate
    length, num_heads, splits, chunk, slots,
    RATES: tl.constexpr, R: tl.constexpr, STREAMS: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Moments of one part of a head: of its queries, and of its keys fused at every rate."""
    pid = tl.program_id(0)
    b, h, part = place(pid, num_heads, splits)
    q_ptr += b * q_b + h.to(tl.int64) * q_h
    k_ptr += b * k_b + h.to(tl.int64) * k_h
    mask_ptr += b * mask_b
    offset_n, stream = tl.arange(0, BLOCK_N), tl.arange(0, STREAMS)
    count, mean, square = (tl.zeros((STREAMS,), COMPUTE), tl.zeros((STREAMS,), COMPUTE), tl.zeros((STREAMS,), COMPUTE))
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        q = load_rows(q_ptr, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
        k = load_rows(k_ptr, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
        tile_count, tile_mean, tile_square = tile_moments(q, real, HEAD_DIM, BLOCK_D, COMPUTE)
        new_count = tl.where(stream == 0, tile_count, 0.0)
        new_mean = tl.where(stream == 0, tile_mean, 0.0)
        new_square = tl.where(stream == 0, tile_square, 0.0)
        for r in tl.static_range(R):
            weight = window_weights(real, RATES[r], BLOCK_N, COMPUTE)
            fused = window_mean(k, weight, RATES[r], BLOCK_N, BLOCK_D)
            window = (weight > 0) if RATES[r] == 1 else _one_row_a_window(weight, RATES[r], BLOCK_N)
            tile_count, tile_mean, tile_square = tile_moments(fused, window, HEAD_DIM, BLOCK_D, COMPUTE)
            new_count = tl.where(stream == r + 1, tile_count, new_count)
            new_mean = tl.where(stream == r + 1, tile_mean, new_mean)
            new_square = tl.where(stream == r + 1, tile_square, new_square)
        total = tl.maximum(count + new_count, 1.0)
        delta = new_mean - mean
        mean += delta * (new_count / total)
        square += new_square + delta * delta * (count * new_count / total)
        count += new_count
    slot_ptr += stream.to(tl.int64) * 3 * slots + pid
    tl.store(slot_ptr, count, mask=stream <= R)
    tl.store(slot_ptr + slots, mean, mask=stream <= R)
    tl.store(slot_ptr + 2 * slots, square, mask=stream <= R)


@triton.jit
def _one_row_a_window(weight, RATE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first row of every window that holds a real token."""
    windows = tl.reshape(weight, (BLOCK_N // RATE, RATE))
    kept = tl.broadcast_to((tl.max(windows, axis=1) > 0)[:, None], (BLOCK_N // RATE, RATE))
    return tl.reshape(kept, (BLOCK_N,)) & (tl.arange(0, BLOCK_N) % RATE == 0)


@triton.jit
def merged_spread(slot_ptr, slots, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    """σ in float64 from the partials of one stream: unbiased, at least SMALLEST, 1 for fewer than two entries."""
    offset = tl.arange(0, BLOCK)
    count, total, square = (
        tl.zeros((BLOCK,), tl.float64),
        tl.zeros((BLOCK,), tl.float64),
        tl.zeros((BLOCK,), tl.float64),
    )
    for first in range(0, slots, BLOCK):
        inside = first + offset < slots
        n = tl.load(slot_ptr + first + offset, mask=inside, other=0.0).to(tl.float64)
        count += n
        total += n * tl.load(slot_ptr + slots + first + offset, mask=inside, other=0.0).to(tl.float64)
    entries = tl.sum(count)
    mean = tl.sum(total) / tl.maximum(entries, 1.0)
    for first in range(0, slots, BLOCK):
        inside = first + offset < slots
        n = tl.load(slot_ptr + first + offset, mask=inside, other=0.0).to(tl.float64)
        delta = tl.load(slot_ptr + slots + first + offset, mask=inside, other=0.0).to(tl.float64) - mean
        square += tl.load(slot_ptr + 2 * slots + first + offset, mask=inside, other=0.0).to(tl.float64)
        square += n * delta * delta
    sigma = tl.maximum(tl.sqrt(tl.sum(square) / tl.maximum(entries - 1.0, 1.0)), SMALLEST)
    return tl.where(entries > 1.0, sigma, 1.0)


@triton.jit
def match_moments_kernel(
    slot_ptr, out_ptr, slots,
    CONSTANT_A: tl.constexpr, CONSTANT_B: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(σq, σk, α, β) of resolution r = program_id: `kernels.lln.moments.match_moments` on the device."""
    r = tl.program_id(0)
    sigma_q = merged_spread(slot_ptr, slots, SMALLEST, BLOCK)
    sigma_k = merged_spread(slot_ptr + (r + 1) * 3 * slots, slots, SMALLEST, BLOCK)
    product = sigma_q * sigma_k
    s = tl.sqrt((product * product - CONSTANT_B) / (2.0 * CONSTANT_A))
    out_ptr += 4 * r
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr, sigma_q.to(kind))
    tl.store(out_ptr + 1, sigma_k.to(kind))
    tl.store(out_ptr + 2, (s / sigma_q).to(kind))
    tl.store(out_ptr + 3, (s / sigma_k).to(kind))


def moments(q: Tensor, k: Tensor, key_mask: Tensor | None, rates: list[int], a: float, b: float) -> Tensor:
    """(R, 4): σ of the real queries, of the keys fused at each rate, and α, β for the constants (a, b)."""
    q, k = unit_last_stride(q), unit_last_stride(k)
    batch, heads, length, dim = q.shape
    tile = 128
    splits, chunk = split(length, tile, batch * heads)
    slots = batch * heads * splits
    partial = torch.empty(1 + len(rates), 3, slots, dtype=state_dtype(q.dtype), device=q.device)
    out = torch.empty(len(rates), 4, dtype=state_dtype(q.dtype), device=q.device)
    partial_moments_kernel[(slots,)](
        q, *strides(q), k, *strides(k), *mask_arguments(key_mask, q), partial,
        length, heads, splits, chunk, slots,
        RATES=tuple(rates), R=len(rates), STREAMS=triton.next_power_of_2(1 + len(rates)), HAS_MASK=key_mask is not None,
        HEAD_DIM=dim, BLOCK_N=tile, BLOCK_D=block_dim(dim), COMPUTE=arithmetic(q.dtype)["COMPUTE"],
        num_warps=4 if dim <= 64 else 8,
    )  # fmt: skip
    match_moments_kernel[(len(rates),)](
        partial, out, slots, CONSTANT_A=a, CONSTANT_B=b, SMALLEST=SMALLEST_SPREAD, BLOCK=SLOTS, num_warps=8
    )
    return out
