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
DIGIT = tl.constexpr(7)
LEVELS = tl.constexpr(5)
BINS = tl.constexpr(128)

SIDE = 128
"""Most blocks of a head that one program ranks: the scores of all pairs are in its registers."""

PAIRS = 2048
"""Pairs that one program of another selection pass takes at once."""

SCORE_ROWS, SCORE_CHUNK = 16, 128


class Selection(NamedTuple):
    """What the selection leaves to the other passes; x and y are query and key blocks, P padded blocks, W = P / 32."""

    means: Tensor  # (3, B·H, P, D') of q, k, v
    counts: Tensor  # (B·H, P) real tokens
    bits: Tensor  # (B·H, P, W) int32: bit y mod 32 of word y // 32 is set where (x, y) is refined
    words: Tensor  # (B·H, W) int32: bits set in a word of all rows
    starts: Tensor  # (B·H, P + 1) int32: where the list of x begins in `listed`
    listed: Tensor  # (B·H, m) int32: the y refined for each x, ascending


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
def pair_keys(
    score, peak, count_x, count_y, x, y, num_blocks, GRADED: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr
):
    """Keys of the pairs (x, y) of a head; a smaller key is a better pair.

    A key has 35 bits: 3 of the class, 31 of max S − S without its sign, and a zero. The class is 3 less the priors
    met, 4 without real tokens on both sides, 5 behind the last block; without GRADED it is 0 for all, and 32 bits do.
    A NaN orders behind every number.
    """
    drop = (peak[:, None] - score).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not GRADED:
        return drop.to(tl.uint32) << 1
    else:
        grade = tl.full(score.shape, 3, tl.int32)
        occupied = (count_x > 0)[:, None] & (count_y > 0)[None, :]
        inside = (x < num_blocks)[:, None] & (y < num_blocks)[None, :]
        if FIRST > 0:
            grade -= (x < FIRST)[:, None].to(tl.int32) + (y < FIRST)[None, :].to(tl.int32)
        if DIAGONAL > 0:
            grade -= (tl.abs(x[:, None] - y[None, :]) <= DIAGONAL // 2).to(tl.int32)
        grade = tl.where(occupied, grade, tl.where(inside, 4, 5))
        return (grade.to(tl.int64) << 32) | (tl.where(occupied, drop, 0).to(tl.int64) << 1)


@triton.jit
def load_keys(
    score_ptr, peak_ptr, count_ptr, head, x, first, num_blocks, side,
    GRADED: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Keys of the pairs of rows x of a head with CHUNK columns."""
    y = first + tl.arange(0, CHUNK)
    row = head * side + x
    score, peak = tl.load(score_ptr + row[:, None] * side + y[None, :]), tl.load(peak_ptr + row)
    count_x, count_y = tl.load(count_ptr + row), tl.load(count_ptr + head * side + y)
    return pair_keys(score, peak, count_x, count_y, x, y, num_blocks, GRADED, FIRST, DIAGONAL)


@triton.jit
def next_digit(count, prefix, rank):
    """The digits so far, and the rank among the pairs that share them, one round of the radix select further."""
    digit = tl.arange(0, BINS)
    found = tl.sum((tl.cumsum(count, axis=0) < rank).to(tl.int32))
    return prefix * BINS + found, rank - tl.sum(tl.where(digit < found, count, 0))


@triton.jit
def count_digits(key, prefix, LEVEL: tl.constexpr, SIZE: tl.constexpr):
    """How often each value of digit LEVEL occurs in the keys that share the digits before it."""
    digits = key >> (DIGIT * (LEVELS - 1 - LEVEL))
    sharing = tl.reshape((digits >> DIGIT) == prefix.to(key.dtype), (SIZE,))
    digits = tl.reshape((digits & (BINS - 1)).to(tl.int32), (SIZE,))
    return tl.histogram(digits, BINS, mask=sharing)


@triton.jit
def leading_digits(digits_ptr, head, budget, LEVEL: tl.constexpr):
    """The first LEVEL digits of the key of pair number `budget`, and its number among the pairs that share them."""
    digit = tl.arange(0, BINS)
    rank, prefix = budget, tl.zeros((), tl.int64)
    for level in tl.static_range(LEVEL):
        count = tl.load(digits_ptr + (head * LEVELS + level) * BINS + digit)
        prefix, rank = next_digit(count, prefix, rank)
    return prefix, rank


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
def store_tally(ptr, head, side, x, better, tied):
    """(B·H, 2, P) int32: pairs of each row that are better than pair number m, and that tie with it."""
    tl.store(ptr + 2 * head * side + x, better)
    tl.store(ptr + (2 * head + 1) * side + x, tied)


@triton.jit
def rank_kernel(
    mean_q_ptr, mean_k_ptr, count_ptr, score_ptr, peak_ptr, tally_ptr, threshold_ptr, words_ptr, num_blocks, budget,
    GRADED: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SIDE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What scores, digits and tally do, for one head of SIDE padded blocks.

    To be launched without contraction to fused multiply-adds: max S − S has to round as it does in `finish_kernel`,
    which reads S from memory. A key that differs in its last bit is counted here and not listed there.
    """
    head = tl.program_id(0).to(tl.int64)
    x, y = tl.arange(0, SIDE), tl.arange(0, SIDE)
    row, column = head * SIDE + x, head * SIDE + y
    mean_q, mean_k = load_means(mean_q_ptr, row, BLOCK_D), load_means(mean_k_ptr, column, BLOCK_D)
    score = product(mean_q, tl.trans(mean_k), COMPUTE, COMPUTE, PRECISION) * (HEAD_DIM**-0.5)
    tl.store(score_ptr + row[:, None] * SIDE + y[None, :], score)
    count_x, count_y = tl.load(count_ptr + row), tl.load(count_ptr + column)
    peak = tl.max(tl.where((count_y > 0)[None, :], score, NEVER), axis=1)
    tl.store(peak_ptr + row, peak)
    key = pair_keys(score, peak, count_x, count_y, x, y, num_blocks, GRADED, FIRST, DIAGONAL)
    threshold, quota = tl.zeros((), tl.int64), budget
    for level in tl.static_range(LEVELS):
        threshold, quota = next_digit(count_digits(key, threshold, level, SIDE * SIDE), threshold, quota)
    store_threshold(threshold_ptr, words_ptr, head, SIDE, threshold, quota)
    threshold = threshold.to(key.dtype)
    better, tied = tl.sum((key < threshold).to(tl.int32), axis=1), tl.sum((key == threshold).to(tl.int32), axis=1)
    store_tally(tally_ptr, head, SIDE, x, better, tied)


@triton.jit
def scores_kernel(
    mean_q_ptr, mean_k_ptr, count_ptr, score_ptr, peak_ptr, digits_ptr, side, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S of ROWS block rows, the maximum of each over blocks with real tokens, and zeros for the radix select."""
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    if tile == 0:
        for level in tl.static_range(LEVELS):
            tl.store(digits_ptr + (head * LEVELS + level) * BINS + tl.arange(0, BINS), 0)
    row = head * side + tile * ROWS + tl.arange(0, ROWS)
    mean_q = load_means(mean_q_ptr, row, BLOCK_D)
    peak = tl.full((ROWS,), NEVER, COMPUTE)
    for first in range(0, side, CHUNK):
        y = first + tl.arange(0, CHUNK)
        mean_k = load_means(mean_k_ptr, head * side + y, BLOCK_D)
        count = tl.load(count_ptr + head * side + y)
        score = product(mean_q, tl.trans(mean_k), COMPUTE, COMPUTE, PRECISION) * (HEAD_DIM**-0.5)
        tl.store(score_ptr + row[:, None] * side + y[None, :], score)
        peak = tl.maximum(peak, tl.max(tl.where((count > 0)[None, :], score, NEVER), axis=1))
    tl.store(peak_ptr + row, peak)


@triton.jit
def digits_kernel(
    score_ptr, peak_ptr, count_ptr, digits_ptr, num_blocks, side, tiles, budget,
    LEVEL: tl.constexpr, GRADED: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds the counts of digit LEVEL over ROWS block rows to those of the head."""
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    x = tile * ROWS + tl.arange(0, ROWS)
    prefix, _rank = leading_digits(digits_ptr, head, budget, LEVEL)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, side, CHUNK):
        key = load_keys(score_ptr, peak_ptr, count_ptr, head, x, first, num_blocks, side,
                        GRADED, FIRST, DIAGONAL, CHUNK)  # fmt: skip
        counts += count_digits(key, prefix, LEVEL, ROWS * CHUNK)
    target = digits_ptr + (head * LEVELS + LEVEL) * BINS + tl.arange(0, BINS)
    tl.atomic_add(target, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def tally_kernel(
    score_ptr, peak_ptr, count_ptr, digits_ptr, tally_ptr, threshold_ptr, words_ptr, num_blocks, side, tiles, budget,
    GRADED: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The key of pair number `budget`; pairs of each of ROWS block rows that are better, and that tie with it."""
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    x = tile * ROWS + tl.arange(0, ROWS)
    threshold, quota = leading_digits(digits_ptr, head, budget, LEVELS)
    if tile == 0:
        store_threshold(threshold_ptr, words_ptr, head, side, threshold, quota)
    better, tied = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
    for first in range(0, side, CHUNK):
        key = load_keys(score_ptr, peak_ptr, count_ptr, head, x, first, num_blocks, side,
                        GRADED, FIRST, DIAGONAL, CHUNK)  # fmt: skip
        better += tl.sum((key < threshold.to(key.dtype)).to(tl.int32), axis=1)
        tied += tl.sum((key == threshold.to(key.dtype)).to(tl.int32), axis=1)
    store_tally(tally_ptr, head, side, x, better, tied)


@triton.jit
def row_shares(tally_ptr, head, side, first, quota, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Where the lists of the rows first … first + ROWS − 1 begin, and how many ties each takes; ties go in order."""
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
    return better_before + taken_before, tl.minimum(tied, quota - taken_before)


@triton.jit
def finish_kernel(
    score_ptr, peak_ptr, count_ptr, tally_ptr, threshold_ptr, bits_ptr, words_ptr, start_ptr, listed_ptr,
    num_blocks, side, tiles, budget,
    GRADED: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Bits and lists of ROWS block rows."""
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    x = tile * ROWS + tl.arange(0, ROWS)
    row, words = head * side + x, side // 32
    threshold, quota = tl.load(threshold_ptr + 2 * head), tl.load(threshold_ptr + 2 * head + 1).to(tl.int32)
    begin, ties = row_shares(tally_ptr, head, side, tile * ROWS, quota, ROWS, CHUNK)
    tl.store(start_ptr + head * (side + 1) + x, begin)
    if tile == 0:
        tl.store(start_ptr + head * (side + 1) + side, budget)
    tied_seen, chosen_seen = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
    for first in range(0, side, CHUNK):
        y = first + tl.arange(0, CHUNK)
        key = load_keys(score_ptr, peak_ptr, count_ptr, head, x, first, num_blocks, side,
                        GRADED, FIRST, DIAGONAL, CHUNK)  # fmt: skip
        tied = (key == threshold.to(key.dtype)).to(tl.int32)
        rank = tied_seen[:, None] + tl.cumsum(tied, axis=1)
        chosen = ((key < threshold.to(key.dtype)) | ((tied > 0) & (rank <= ties[:, None]))).to(tl.int32)
        place_in_row = chosen_seen[:, None] + tl.cumsum(chosen, axis=1) - 1
        target = listed_ptr + head * budget + begin[:, None] + place_in_row
        tl.store(target, tl.broadcast_to(y[None, :], (ROWS, CHUNK)), mask=chosen > 0)
        tied_seen += tl.sum(tied, axis=1)
        chosen_seen += tl.sum(chosen, axis=1)

        by_word = tl.reshape(chosen, (ROWS, CHUNK // 32, 32))
        packed = tl.sum(by_word << tl.arange(0, 32)[None, None, :], axis=2)
        word = first // 32 + tl.arange(0, CHUNK // 32)
        tl.store(bits_ptr + row[:, None] * words + word[None, :], packed)
        tl.atomic_add(words_ptr + head * words + word, tl.sum(tl.sum(by_word, axis=2), axis=0), sem="relaxed")


@triton.jit
def coarse_sums_kernel(
    score_ptr, count_ptr, bits_ptr, mean_v_ptr, peak_ptr, mass_ptr, sum_ptr, words,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the unrefined pairs of 32 block rows add to the output.

    peak = log₂ max e^S, mass = Σ c_y e^S / 2^peak, sum = Σ c_y e^S v̄_y / 2^peak, all over y not refined.
    """
    head, tile = (tl.program_id(0) // words).to(tl.int64), tl.program_id(0) % words
    offset, first = tl.arange(0, 32), head * words * 32
    row = first + tile * 32 + offset
    peak, mass = tl.full((32,), NEVER, COMPUTE), tl.zeros((32,), COMPUTE)
    total = tl.zeros((32, BLOCK_D), COMPUTE)
    for word in range(0, words):
        y = word * 32 + offset
        score = tl.load(score_ptr + row[:, None] * (words * 32) + y[None, :])
        packed, count = tl.load(bits_ptr + row * words + word), tl.load(count_ptr + first + y)
        mean_v = load_means(mean_v_ptr, first + y, BLOCK_D)
        refined = (packed[:, None] >> offset[None, :]) & 1
        logits = tl.where((refined == 0) & (count > 0)[None, :], score * LOG2E, -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        weights = tl.exp2(logits - higher[:, None]) * count[None, :]
        scale = tl.exp2(peak - higher)
        total = total * scale[:, None] + product(weights, mean_v, COMPUTE, OPERAND, PRECISION)
        mass = mass * scale + tl.sum(weights, axis=1)
        peak = higher
    tl.store(peak_ptr + row, peak)
    tl.store(mass_ptr + row, mass)
    tl.store(sum_ptr + row[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], total)


@triton.jit
def columns_kernel(bits_ptr, words_ptr, start_ptr, listed_ptr, side, budget, BLOCK_W: tl.constexpr, ROWS: tl.constexpr):
    """The list of x refined for each y, ascending, for the 32 y of one word of bits."""
    words = side // 32
    head, word = (tl.program_id(0) // words).to(tl.int64), tl.program_id(0) % words
    bit, earlier = tl.arange(0, 32), tl.arange(0, BLOCK_W)
    before = tl.load(words_ptr + head * words + earlier, mask=earlier < word, other=0)
    counts = tl.zeros((32,), tl.int32)
    for first in range(0, side, ROWS):
        x = first + tl.arange(0, ROWS)
        packed = tl.load(bits_ptr + (head * side + x) * words + word)
        counts += tl.sum((packed[:, None] >> bit[None, :]) & 1, axis=0)
    begin = tl.sum(before) + tl.cumsum(counts, axis=0) - counts
    tl.store(start_ptr + head * (side + 1) + word * 32 + bit, begin)
    if word == 0:
        tl.store(start_ptr + head * (side + 1) + side, budget)
    for first in range(0, side, ROWS):
        x = first + tl.arange(0, ROWS)
        packed = tl.load(bits_ptr + (head * side + x) * words + word)
        chosen = (packed[:, None] >> bit[None, :]) & 1
        target = listed_ptr + head * budget + begin[None, :] + tl.cumsum(chosen, axis=0) - 1
        tl.store(target, tl.broadcast_to(x[:, None], (ROWS, 32)), mask=chosen > 0)
        begin += tl.sum(chosen, axis=0)


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
) -> tuple[Selection, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The `budget` pairs of every head, and with `full` the coarse peak, mass (B·H, P) and sum (B·H, P, D')."""
    num_blocks = triton.cdiv(q.shape[2], block_size)
    side, width, kinds = padded(num_blocks), block_dim(q.shape[3]), arithmetic(q.dtype)
    means, counts = pool(q, k, v, key_mask, block_size)
    sequences, words = len(counts), side // 32
    whole = dict(dtype=torch.int32, device=q.device)
    chosen = Selection(
        means=means, counts=counts, bits=torch.empty(sequences, side, words, **whole),
        words=torch.empty(sequences, words, **whole), starts=torch.empty(sequences, side + 1, **whole),
        listed=torch.empty(sequences, budget, **whole),
    )  # fmt: skip
    scores, peaks = counts.new_empty(sequences, side, side), torch.empty_like(counts)
    tally = torch.empty(sequences, 2, side, **whole)
    threshold = torch.empty(sequences, 2, dtype=torch.int64, device=q.device)
    graded = key_mask is not None or first_blocks > 0 or diagonal_blocks > 0 or side > num_blocks
    order = dict(GRADED=graded, FIRST=first_blocks, DIAGONAL=diagonal_blocks)
    products = dict(HEAD_DIM=q.shape[3], BLOCK_D=width, COMPUTE=kinds["COMPUTE"], PRECISION=score_precision(q.dtype))
    chunk = min(512, side)
    rows = min(16, PAIRS // chunk)
    grid, sizes = (sequences * (side // rows),), (num_blocks, side, side // rows, budget)
    shape = dict(ROWS=rows, CHUNK=chunk, num_warps=4)
    if side <= SIDE:
        rank_kernel[(sequences,)](
            means[0], means[1], counts, scores, peaks, tally, threshold, chosen.words, num_blocks, budget,
            **order, **products, SIDE=side, num_warps=side // 8, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        digits = torch.empty(sequences, LEVELS.value, BINS.value, **whole)
        scores_kernel[(sequences * (side // SCORE_ROWS),)](
            means[0], means[1], counts, scores, peaks, digits, side, side // SCORE_ROWS,
            **products, ROWS=SCORE_ROWS, CHUNK=min(SCORE_CHUNK, side), num_warps=4,
        )  # fmt: skip
        keys = (scores, peaks, counts, digits)
        for level in range(LEVELS.value):
            digits_kernel[grid](*keys, *sizes, LEVEL=level, **order, **shape)
        tally_kernel[grid](*keys, tally, threshold, chosen.words, *sizes, **order, **shape)
    finish_kernel[grid](
        scores, peaks, counts, tally, threshold, chosen.bits, chosen.words, chosen.starts, chosen.listed, *sizes,
        **order, **shape,
    )  # fmt: skip
    if not full:
        return chosen, (counts, counts, counts)
    coarse = (torch.empty_like(counts), torch.empty_like(counts), torch.empty_like(means[0]))
    coarse_sums_kernel[(sequences * words,)](
        scores, counts, chosen.bits, means[2], *coarse, words, BLOCK_D=width, **kinds, num_warps=2
    )
    return chosen, coarse


def transpose(chosen: Selection) -> tuple[Tensor, Tensor]:
    """Starts (B·H, P + 1) and lists (B·H, m) of the x refined for each y."""
    starts, listed = torch.empty_like(chosen.starts), torch.empty_like(chosen.listed)
    sequences, side, words = chosen.bits.shape
    rows = min(128, side)
    columns_kernel[(sequences * words,)](
        chosen.bits, chosen.words, starts, listed, side, listed.shape[1],
        BLOCK_W=triton.next_power_of_2(words), ROWS=rows, num_warps=rows // 32,
    )  # fmt: skip
    return starts, listed
