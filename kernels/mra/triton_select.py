"""Block means, the choice of the pairs to refine, and the coarse part of the output, without a host round trip.

    pool     q̄, k̄, v̄ of every block: one touch of q, k, v
    rank     S = τ q̄ k̄ᵀ and its row maxima; the key of the m-th best pair, by a radix select of 7 bits a round; how many
             pairs of each row are better, and how many tie with it
    finish   the refined pairs as bits and as a list in order
    coarse   the sums over all the other pairs

Up to 128 blocks one program holds the scores of its head, and ranks them in one launch. Longer sequences take seven:
scores, digits for each round of the select, tally; the floor of each is one read of P² scores a head.

A pair's key orders as `kernels.mra.reference.select_blocks` does: class (occupied, priors), then the bits of the
float32 max S − S ≥ 0. Counts are integers: atomic additions of them give the same result in every order.

nb blocks are padded to P, so that no tile is cut; the blocks behind the last hold no real token, and their pairs are
never refined.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import arithmetic, block_dim, mask_arguments, state_dtype, strides
from kernels.common.tiles import NEVER, load_rows, place, product, real_rows

LOG2E = tl.constexpr(1.4426950408889634)

PAIRS = 16384
"""Pairs that one program ranks: their keys are in its registers."""

SLACK = tl.constexpr(1 << 17)
"""How far apart, in steps of a float32, the bounds of a part of a head may be: half a percent of the drop, or two."""

FINISH = (64, 4)

CHUNK = 512
"""Most columns of a tile of pairs."""


class Selection(NamedTuple):
    """What the selection leaves to the other passes; x and y are query and key blocks, P padded blocks, W = P / 32."""

    means: Tensor  # (3, B·H, P, D') of q, k, v
    counts: Tensor  # (B·H, P) real tokens
    bits: Tensor  # (B·H, P, W) int32: bit y mod 32 of word y // 32 is set where (x, y) is refined
    words: Tensor  # (B·H, W) int32: bits set in a word of all rows
    starts: Tensor  # (B·H, P + 1) int32: where the list of x begins in `listed`
    listed: Tensor  # (B·H, m) int32: the y refined for each x, ascending
    peaks: Tensor  # (B·H, P): log₂ of max e^S over the unrefined y of each x
    weights: Tensor  # (B·H, P, P): c_y e^S / 2^peak of the unrefined pairs, else 0; empty without a coarse part


def padded(blocks: int) -> int:
    """P: a power of two of at least 32, or a multiple of 512."""
    return max(32, triton.next_power_of_2(blocks)) if blocks <= 512 else triton.cdiv(blocks, 512) * 512


@triton.jit
def fill_rows(ptr, value, first, last, WIDTH: tl.constexpr):
    """`value` in the rows first … last − 1 of a (…, WIDTH) buffer."""
    for start in range(first, last, 32):
        row = start + tl.arange(0, 32)
        position = ptr + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(position, tl.full((32, WIDTH), value, ptr.dtype.element_ty), mask=(row < last)[:, None])


@triton.jit
def block_mean(
    ptr, stride_n, start, offset_n, real, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr
):
    """Sum of the real rows of a block, times `scale`."""
    rows = load_rows(ptr, stride_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    return tl.sum(rows.to(COMPUTE), axis=0) * scale


@triton.jit
def pool_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    mean_ptr, count_ptr, mean_stride, length, num_heads, num_blocks, side,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Means of one block, and its number of real tokens; zeros behind the last block."""
    b, h, block = place(tl.program_id(0), num_heads, num_blocks)
    wide_h = h.to(tl.int64)
    offset_n, offset_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    start = block * BLOCK
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK)
    count = tl.sum(tl.where(real, 1.0, 0.0).to(COMPUTE))
    scale = 1.0 / tl.maximum(count, 1.0)
    mean_q = block_mean(q_ptr + b * q_b + wide_h * q_h, q_n, start, offset_n, real, scale, HEAD_DIM, BLOCK_D, COMPUTE)
    mean_k = block_mean(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, scale, HEAD_DIM, BLOCK_D, COMPUTE)
    mean_v = block_mean(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, scale, HEAD_DIM, BLOCK_D, COMPUTE)
    count_ptr += (b * num_heads + h) * side
    mean_ptr += (b * num_heads + h) * side * BLOCK_D
    tl.store(count_ptr + block, count)
    tl.store(mean_ptr + block * BLOCK_D + offset_d, mean_q)
    tl.store(mean_ptr + mean_stride + block * BLOCK_D + offset_d, mean_k)
    tl.store(mean_ptr + 2 * mean_stride + block * BLOCK_D + offset_d, mean_v)
    if block == num_blocks - 1:
        fill_rows(count_ptr, 0.0, num_blocks, side, 1)
        for part in tl.static_range(3):
            fill_rows(mean_ptr + part * mean_stride, 0.0, num_blocks, side, BLOCK_D)


@triton.jit
def load_means(ptr, row, BLOCK_D: tl.constexpr):
    """Rows of (…, D') means or sums of blocks."""
    return tl.load(ptr + row[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def score_chunk(mean_q, mean_k_ptr, count_ptr, column, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                COMPUTE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """S of block rows with the blocks `column`, and which of those have real tokens."""
    mean_k = load_means(mean_k_ptr, column, BLOCK_D)
    score = product(mean_q, tl.trans(mean_k), COMPUTE, COMPUTE, PRECISION) * (HEAD_DIM**-0.5)
    return score, tl.load(count_ptr + column) > 0


@triton.jit
def pair_keys(drop, x, y, FIRST: tl.constexpr, DIAGONAL: tl.constexpr):
    """Keys of pairs (x, y); a smaller key is a better pair.

    The bits of a float32 ≥ 0 order as it does, and those of a negative one behind them, also behind a NaN: 32 bits do
    without priors. With priors 3 bits of the class come before them: 3 less the priors met, 4 without real tokens.
    """
    key = drop.to(tl.float32).to(tl.uint32, bitcast=True)
    if FIRST == 0 and DIAGONAL == 0:
        return key
    else:
        grade = tl.full(key.shape, 3, tl.int32)
        if FIRST > 0:
            grade -= (x < FIRST).to(tl.int32) + (y < FIRST).to(tl.int32)
        if DIAGONAL > 0:
            grade -= (tl.abs(x - y) <= DIAGONAL // 2).to(tl.int32)
        grade = tl.where(drop < 0, 4, grade)
        return (grade.to(tl.int64) << 32) | key.to(tl.int64)


@triton.jit
def bisect(key, rank, low, high, SLACK: tl.constexpr):
    """Bounds, at most SLACK apart, of key number `rank`, from 1 on, of a tile; it lies from `low` to `high`."""
    while high - low > SLACK:
        middle = (low + high) >> 1
        seen = tl.sum((key <= middle.to(key.dtype)).to(tl.int32))
        low = tl.where(seen < rank, middle + 1, tl.where(seen == rank, middle, low))  # middle parts `rank` keys off
        high = tl.where(seen < rank, high, middle)
    high = tl.max(tl.where(key <= high.to(key.dtype), key, 0).to(tl.int64))
    return tl.minimum(low, high), high


@triton.jit
def store_threshold(threshold_ptr, words_ptr, head, side, threshold, quota):
    """(B·H, 2) int64: the key of pair number m, and how many pairs with that key are refined; zeros for `words`."""
    tl.store(threshold_ptr + 2 * head, threshold)
    tl.store(threshold_ptr + 2 * head + 1, quota.to(tl.int64))
    words = side // 32
    for first in range(0, words, 128):
        word = first + tl.arange(0, 128)
        tl.store(words_ptr + head * words + word, 0, mask=word < words)


@triton.jit
def tallies(drop, key, threshold):
    """Of each row of a tile: pairs with keys before the threshold, pairs with it, the least drop of those behind it."""
    better, tied = key < threshold.to(key.dtype), key == threshold.to(key.dtype)
    rest = tl.where(better | tied | (drop < 0), float("inf"), drop)
    return tl.sum(better.to(tl.int32), axis=1), tl.sum(tied.to(tl.int32), axis=1), tl.min(rest, axis=1)


@triton.jit
def store_tally(tally_ptr, rest_ptr, head, side, x, better, tied, rest):
    """(B·H, 2, P) int32 and (B·H, P): what `tallies` says of the rows."""
    tl.store(tally_ptr + 2 * head * side + x, better)
    tl.store(tally_ptr + (2 * head + 1) * side + x, tied)
    tl.store(rest_ptr + head * side + x, rest)


@triton.jit
def rank_kernel(
    mean_q_ptr, mean_k_ptr, count_ptr, drop_ptr, peak_ptr, bound_ptr, found_ptr, threshold_ptr, tally_ptr,
    rest_ptr, words_ptr, num_blocks, side, tiles, share,
    FIRST: tl.constexpr, DIAGONAL: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, WHOLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """max S − S of ROWS block rows, negative where a pair has no tokens, and bounds of each chunk's key `share`.

    Rows of a program lie apart, as do the columns of a chunk, so that each is a sample of the head. With WHOLE the one
    chunk is all of it. Launched without contraction to fused multiply-adds: the best pair of a row drops by zero.
    """
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    x, offset = tile + tiles * tl.arange(0, ROWS), CHUNKS * tl.arange(0, CHUNK)
    row = head * side + x
    mean_q, occupied = load_means(mean_q_ptr, row, BLOCK_D), tl.load(count_ptr + row) > 0
    score, real = score_chunk(mean_q, mean_k_ptr, count_ptr, head * side + offset,
                              HEAD_DIM, BLOCK_D, COMPUTE, PRECISION)  # fmt: skip
    peak = tl.max(tl.where(real[None, :], score, NEVER), axis=1)
    for chunk in range(1, CHUNKS):
        score, real = score_chunk(mean_q, mean_k_ptr, count_ptr, head * side + offset + chunk,
                                  HEAD_DIM, BLOCK_D, COMPUTE, PRECISION)  # fmt: skip
        peak = tl.maximum(peak, tl.max(tl.where(real[None, :], score, NEVER), axis=1))
    tl.store(peak_ptr + row, peak)
    if tile == 0:
        tl.store(found_ptr + 2 * head + tl.arange(0, 2), 0)
    for chunk in range(0, CHUNKS):
        y = offset + chunk
        if CHUNKS > 1:
            score, real = score_chunk(mean_q, mean_k_ptr, count_ptr, head * side + y,
                                      HEAD_DIM, BLOCK_D, COMPUTE, PRECISION)  # fmt: skip
        inside = (x < num_blocks)[:, None] & (y < num_blocks)[None, :]
        drop = tl.where(occupied[:, None] & real[None, :], tl.abs(peak[:, None] - score), tl.where(inside, -1.0, -2.0))
        tl.store(drop_ptr + row[:, None] * side + y[None, :], drop)
        key = pair_keys(drop, x[:, None], y[None, :], FIRST, DIAGONAL)
        last = tl.full((), (1 << BITS) - 1, tl.int64)
        low, high = bisect(key, share, last * 0, last, 0 if WHOLE else SLACK)
        part = 2 * ((head * tiles + tile) * CHUNKS + chunk)
        tl.store(bound_ptr + part, low)
        tl.store(bound_ptr + part + 1, high)
        if WHOLE:
            better, tied, rest = tallies(drop, key, high)
            store_threshold(threshold_ptr, words_ptr, head, side, high, share - tl.sum(better))
            store_tally(tally_ptr, rest_ptr, head, side, x, better, tied, rest)


@triton.jit
def outer_bounds(bound_ptr, head, parts, PARTS: tl.constexpr):
    """Bounds of the key of pair number m of a head: the least and the greatest of those of its parts."""
    part = 2 * (head * parts + tl.minimum(tl.arange(0, PARTS), parts - 1))
    return tl.min(tl.load(bound_ptr + part)), tl.max(tl.load(bound_ptr + part + 1))


@triton.jit
def narrow_kernel(
    drop_ptr, bound_ptr, found_ptr, candidate_ptr, side, tiles, parts,
    FIRST: tl.constexpr, DIAGONAL: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Gathers the keys from the least bound to before the greatest, in any order, and counts those before them."""
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    pair = tile * SIZE + tl.arange(0, SIZE)
    first = head * side * side
    key = pair_keys(tl.load(drop_ptr + first + pair), pair // side, pair % side, FIRST, DIAGONAL)
    low, high = outer_bounds(bound_ptr, head, parts, PARTS)
    before = key < low.to(key.dtype)
    between = (key < high.to(key.dtype)) & (key >= low.to(key.dtype))
    tl.atomic_add(found_ptr + 2 * head, tl.sum(before.to(tl.int32)), sem="relaxed")
    slot = tl.atomic_add(found_ptr + 2 * head + 1 + pair * 0, 1, mask=between, sem="relaxed")
    tl.store(candidate_ptr + first + slot, key, mask=between)


@triton.jit
def count_candidates(candidate_ptr, number, bound, SIZE: tl.constexpr):
    """How many of `number` keys are at most `bound`."""
    seen = tl.zeros((SIZE,), tl.int32)
    for first in range(0, number, SIZE):
        place = first + tl.arange(0, SIZE)
        key = tl.load(candidate_ptr + place, mask=place < number, other=0)
        seen += ((key <= bound.to(key.dtype)) & (place < number)).to(tl.int32)
    return tl.sum(seen)


@triton.jit
def settle_kernel(
    bound_ptr, found_ptr, candidate_ptr, threshold_ptr, words_ptr, side, parts, budget,
    BITS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The key of pair number `budget` of a head; more than SIZE candidates are read again for each bisection."""
    head = tl.program_id(0).to(tl.int64)
    candidate_ptr += head * side * side
    low, high = outer_bounds(bound_ptr, head, parts, PARTS)
    number = tl.load(found_ptr + 2 * head + 1)
    rank = budget - tl.load(found_ptr + 2 * head)
    low = tl.where(rank > number, high, low)
    if number <= SIZE:
        place = tl.arange(0, SIZE)
        key = tl.load(candidate_ptr + place, mask=place < number, other=(1 << BITS) - 1)
        if low < high:
            low, high = bisect(key, rank, low, high, 0)
        before = tl.sum((key < high.to(key.dtype)).to(tl.int32))
    else:
        while low < high:
            middle = (low + high) >> 1
            enough = count_candidates(candidate_ptr, number, middle, SIZE) >= rank
            low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
        before = count_candidates(candidate_ptr, number, high - 1, SIZE)
    store_threshold(threshold_ptr, words_ptr, head, side, high, rank - before)


@triton.jit
def load_keys(drop_ptr, head, x, y, side, FIRST: tl.constexpr, DIAGONAL: tl.constexpr):
    """max S − S of the pairs of rows x of a head with columns y, and their keys."""
    drop = tl.load(drop_ptr + (head * side + x)[:, None] * side + y[None, :])
    return drop, pair_keys(drop, x[:, None], y[None, :], FIRST, DIAGONAL)


@triton.jit
def tally_kernel(
    drop_ptr, threshold_ptr, tally_ptr, rest_ptr, side, tiles,
    FIRST: tl.constexpr, DIAGONAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`tallies` of ROWS block rows."""
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    threshold = tl.load(threshold_ptr + 2 * head)
    x = tile * ROWS + tl.arange(0, ROWS)
    better, tied = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
    rest = tl.full((ROWS,), float("inf"), rest_ptr.dtype.element_ty)
    for first in range(0, side, CHUNK):
        drop, key = load_keys(drop_ptr, head, x, first + tl.arange(0, CHUNK), side, FIRST, DIAGONAL)
        more_better, more_tied, least = tallies(drop, key, threshold)
        better, tied, rest = better + more_better, tied + more_tied, tl.minimum(rest, least)
    store_tally(tally_ptr, rest_ptr, head, side, x, better, tied, rest)


@triton.jit
def row_shares(tally_ptr, head, side, first, quota, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Where the lists of the rows first … first + ROWS − 1 begin, and how many ties each has, and takes, in order."""
    better_ptr, tied_ptr = tally_ptr + 2 * head * side, tally_ptr + (2 * head + 1) * side
    better_before, tied_before = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.int32)
    for start in range(0, first, CHUNK):
        row = start + tl.arange(0, CHUNK)
        better_before += tl.load(better_ptr + row, mask=row < first, other=0)
        tied_before += tl.load(tied_ptr + row, mask=row < first, other=0)
    x = first + tl.arange(0, ROWS)
    better, tied = tl.load(better_ptr + x), tl.load(tied_ptr + x)
    better_before = tl.sum(better_before) + tl.cumsum(better, axis=0) - better
    tied_before = tl.sum(tied_before) + tl.cumsum(tied, axis=0) - tied
    taken_before = tl.minimum(tied_before, quota)
    return better_before + taken_before, tied, tl.minimum(tied, quota - taken_before)


@triton.jit
def coarse_peak(score_peak, rest, threshold, left):
    """log₂ of max e^S over the unrefined pairs of each row, of which ties with the threshold are some where `left`."""
    level = threshold.to(tl.uint32).to(tl.float32, bitcast=True)
    level = tl.where(left, level, -1.0)
    rest = tl.where(level >= 0, tl.minimum(rest, level), rest)
    return tl.where(rest < float("inf"), (score_peak - rest) * LOG2E, NEVER)


@triton.jit
def finish_kernel(
    drop_ptr, peak_ptr, rest_ptr, count_ptr, mean_v_ptr, tally_ptr, threshold_ptr,
    bits_ptr, words_ptr, start_ptr, listed_ptr, coarse_peak_ptr, coarse_mass_ptr, coarse_sum_ptr, weight_ptr,
    side, tiles, budget,
    FULL: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bits and lists of ROWS block rows, and with FULL what their unrefined pairs add to the output.

    peak = log₂ max e^S, weights = c_y e^S / 2^peak, mass = Σ weights, sum = Σ weights v̄_y, over all y not refined.
    """
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    x = tile * ROWS + tl.arange(0, ROWS)
    row, words = head * side + x, side // 32
    threshold, quota = tl.load(threshold_ptr + 2 * head), tl.load(threshold_ptr + 2 * head + 1).to(tl.int32)
    begin, tied_in_row, ties = row_shares(tally_ptr, head, side, tile * ROWS, quota, ROWS, CHUNK)
    tl.store(start_ptr + head * (side + 1) + x, begin)
    if tile == 0:
        tl.store(start_ptr + head * (side + 1) + side, budget)
    seen, mass = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), COMPUTE)
    total = tl.zeros((ROWS, BLOCK_D), COMPUTE)
    score_peak = tl.load(peak_ptr + row)
    peak = coarse_peak(score_peak, tl.load(rest_ptr + row), threshold, tied_in_row > ties)
    for first in range(0, side, CHUNK):
        y = first + tl.arange(0, CHUNK)
        drop, key = load_keys(drop_ptr, head, x, y, side, FIRST, DIAGONAL)
        better, tied = key < threshold.to(key.dtype), key == threshold.to(key.dtype)
        # Better pairs are counted in the low half of a word, ties in the high half: one scan for both.
        step = better.to(tl.int32) + (tied.to(tl.int32) << 16)
        count = seen[:, None] + tl.cumsum(step, axis=1)
        seen += tl.sum(step, axis=1)
        rank = count >> 16
        chosen = better | (tied & (rank <= ties[:, None]))
        place_in_row = (count & 0xFFFF) + tl.minimum(rank, ties[:, None]) - 1
        target = listed_ptr + head * budget + begin[:, None] + place_in_row
        tl.store(target, tl.broadcast_to(y[None, :], (ROWS, CHUNK)), mask=chosen)

        by_word = tl.reshape(chosen.to(tl.int32), (ROWS, CHUNK // 32, 32))
        packed = tl.sum(by_word << tl.arange(0, 32)[None, None, :], axis=2)
        word = first // 32 + tl.arange(0, CHUNK // 32)
        tl.store(bits_ptr + row[:, None] * words + word[None, :], packed)
        tl.atomic_add(words_ptr + head * words + word, tl.sum(tl.sum(by_word, axis=2), axis=0), sem="relaxed")
        if FULL:
            count_y, mean_v = tl.load(count_ptr + head * side + y), load_means(mean_v_ptr, head * side + y, BLOCK_D)
            logits = (score_peak[:, None] - drop) * LOG2E - peak[:, None]
            weights = tl.exp2(tl.where(chosen | (drop < 0), -float("inf"), logits)) * count_y[None, :]
            tl.store(weight_ptr + row[:, None] * side + y[None, :], weights.to(OPERAND))
            total += product(weights, mean_v, COMPUTE, OPERAND, PRECISION)
            mass += tl.sum(weights, axis=1)
    if FULL:
        tl.store(coarse_peak_ptr + row, peak)
        tl.store(coarse_mass_ptr + row, mass)
        tl.store(coarse_sum_ptr + row[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], total)


@triton.jit
def halves(pairs, half):
    """(…, K) → (…, 2, K): the low and the high 16 bits, which are two counts."""
    return (tl.expand_dims(pairs, -2) >> (16 * half)[:, None]) & 0xFFFF


@triton.jit
def columns_kernel(bits_ptr, words_ptr, start_ptr, listed_ptr, side, budget, BLOCK_W: tl.constexpr, ROWS: tl.constexpr):
    """The list of x refined for each y, ascending, for the 32 y of one word of bits; a scan counts two y at once."""
    words = side // 32
    head, word = (tl.program_id(0) // words).to(tl.int64), tl.program_id(0) % words
    low, half, earlier = tl.arange(0, 16), tl.arange(0, 2), tl.arange(0, BLOCK_W)
    before = tl.load(words_ptr + head * words + earlier, mask=earlier < word, other=0)
    counts = tl.zeros((2, 16), tl.int32)
    for first in range(0, side, ROWS):
        packed = tl.load(bits_ptr + (head * side + first + tl.arange(0, ROWS)) * words + word)
        counts += halves(tl.sum((packed[:, None] >> low[None, :]) & 0x10001, axis=0), half)
    counts = tl.reshape(counts, (32,))
    begin = tl.sum(before) + tl.cumsum(counts, axis=0) - counts
    tl.store(start_ptr + head * (side + 1) + word * 32 + tl.arange(0, 32), begin)
    if word == 0:
        tl.store(start_ptr + head * (side + 1) + side, budget)
    begin = tl.reshape(begin, (2, 16))
    for first in range(0, side, ROWS):
        x = first + tl.arange(0, ROWS)
        packed = tl.load(bits_ptr + (head * side + x) * words + word)
        pairs = (packed[:, None] >> low[None, :]) & 0x10001
        place = begin[None, :, :] + halves(tl.cumsum(pairs, axis=0), half) - 1
        target = listed_ptr + head * budget + place
        tl.store(target, tl.broadcast_to(x[:, None, None], (ROWS, 2, 16)), mask=halves(pairs, half) > 0)
        begin += halves(tl.sum(pairs, axis=0), half)


# ------------------------------------------------------------------------------------------------------------ launches


def score_precision(dtype: torch.dtype) -> str:
    """Precision of products of block means: as good as float32, on tensor cores for the half precisions."""
    return "tf32x3" if dtype in (torch.bfloat16, torch.float16) else "ieee"


def pool(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    """Means of q, k, v (3, B·H, P, D') and counts of real tokens (B·H, P) of every block."""
    batch, heads, length, dim = q.shape
    num_blocks = triton.cdiv(length, block_size)
    side = padded(num_blocks)
    width, options = block_dim(dim), dict(dtype=state_dtype(q.dtype), device=q.device)
    means = torch.empty(3, batch * heads, side, width, **options)
    counts = torch.empty(batch * heads, side, **options)
    pool_kernel[(batch * heads * num_blocks,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask_arguments(key_mask, q), means, counts,
        means.stride(0), length, heads, num_blocks, side,
        HAS_MASK=key_mask is not None, BLOCK=block_size, HEAD_DIM=dim, BLOCK_D=width,
        COMPUTE=arithmetic(q.dtype)["COMPUTE"], num_warps=max(1, block_size * width // 1024),
    )  # fmt: skip
    return means, counts


def select(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, full: bool, block_size: int, budget: int,
    first_blocks: int, diagonal_blocks: int,
) -> tuple[Selection, tuple[Tensor, Tensor]]:  # fmt: skip
    """The `budget` pairs of every head, and with `full` the coarse mass (B·H, P) and sum (B·H, P, D')."""
    num_blocks = triton.cdiv(q.shape[2], block_size)
    side, width, kinds = padded(num_blocks), block_dim(q.shape[3]), arithmetic(q.dtype)
    means, counts = pool(q, k, v, key_mask, block_size)
    sequences, chunk = len(counts), min(CHUNK, side)
    drops, peaks, rest = counts.new_empty(sequences, side, side), torch.empty_like(counts), torch.empty_like(counts)
    threshold = torch.empty(sequences, 2, dtype=torch.int64, device=q.device)
    whole = dict(dtype=torch.int32, device=q.device)
    tally, words = torch.empty(sequences, 2, side, **whole), torch.empty(sequences, side // 32, **whole)

    order, chunks = dict(FIRST=first_blocks, DIAGONAL=diagonal_blocks), side // chunk
    bits = 35 if first_blocks > 0 or diagonal_blocks > 0 else 32
    rows = min(side, max(16, PAIRS // chunk))
    tiles = side // rows
    parts, found = tiles * chunks, torch.empty(sequences, 2, **whole)
    bound = threshold.new_empty(sequences, parts, 2)
    rank_kernel[(sequences * tiles,)](
        means[0], means[1], counts, drops, peaks, bound, found, threshold, tally, rest, words,
        num_blocks, side, tiles, triton.cdiv(budget, parts),
        **order, BITS=bits, ROWS=rows, CHUNK=chunk, CHUNKS=chunks, WHOLE=parts == 1,
        HEAD_DIM=q.shape[3], BLOCK_D=width, COMPUTE=kinds["COMPUTE"], PRECISION=score_precision(q.dtype),
        num_warps=max(1, rows * chunk // 2048), enable_fp_fusion=False,
    )  # fmt: skip
    rows = min(16, side)
    tiles = side // rows
    if parts > 1:
        kind = torch.uint32 if bits == 32 else torch.int64
        candidates = torch.empty(sequences, side * side, dtype=kind, device=q.device)
        size, lists = min(8192, side * side), dict(PARTS=triton.next_power_of_2(parts))
        narrow_kernel[(sequences * (side * side // size),)](
            drops, bound, found, candidates, side, side * side // size, parts, **order, **lists, SIZE=size, num_warps=4
        )
        settle_kernel[(sequences,)](
            bound, found, candidates, threshold, words, side, parts, budget, **lists, BITS=bits, SIZE=size, num_warps=8
        )
        tally_kernel[(sequences * tiles,)](
            drops, threshold, tally, rest, side, tiles, **order, ROWS=rows, CHUNK=chunk, num_warps=8
        )
    chosen = Selection(
        means=means, counts=counts, bits=torch.empty(sequences, side, side // 32, **whole), words=words,
        starts=torch.empty(sequences, side + 1, **whole), listed=torch.empty(sequences, budget, **whole),
        peaks=torch.empty_like(counts), weights=weights_like(counts, q.dtype, full),
    )  # fmt: skip
    mass, sums = (torch.empty_like(counts), torch.empty_like(means[0])) if full else (counts, counts)
    finish_kernel[(sequences * tiles,)](
        drops, peaks, rest, counts, means[2], tally, threshold,
        chosen.bits, words, chosen.starts, chosen.listed, chosen.peaks, mass, sums, chosen.weights, side, tiles, budget,
        FULL=full, **order, ROWS=rows, CHUNK=min(FINISH[0], side), BLOCK_D=width, **kinds,
        num_warps=FINISH[1], num_stages=2,
    )  # fmt: skip
    return chosen, (mass, sums)


def weights_like(counts: Tensor, dtype: torch.dtype, full: bool) -> Tensor:
    """Room for the weights of the unrefined pairs, in what products with them multiply in: (B·H, P, P), or empty."""
    side = counts.shape[1] if full else 0
    return counts.new_empty(len(counts), side, side, dtype=dtype if dtype == torch.bfloat16 else counts.dtype)


def transpose(chosen: Selection) -> tuple[Tensor, Tensor]:
    """Starts (B·H, P + 1) and lists (B·H, m) of the x refined for each y."""
    starts, listed = torch.empty_like(chosen.starts), torch.empty_like(chosen.listed)
    sequences, side, words = chosen.bits.shape
    rows = min(512, side)
    columns_kernel[(sequences * words,)](
        chosen.bits, chosen.words, starts, listed, side, listed.shape[1],
        BLOCK_W=triton.next_power_of_2(words), ROWS=rows, num_warps=max(1, rows // 64),
    )  # fmt: skip
    return starts, listed
