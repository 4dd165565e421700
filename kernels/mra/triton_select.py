"""Block means, the choice of the pairs to refine, and the coarse part of the output, without a host round trip.

    pool     q̄, k̄, v̄ of every block: one touch of q, k, v
    scores   S = τ q̄ k̄ᵀ and its row maxima, (nb, nb) a head
    digits   5 passes of a radix select: each finds 7 bits of the key of the m-th best pair
    tally    how many pairs of each row are better than that one, and how many tie with it
    finish   the refined pairs as bits and as a list in order, and the sums over all the others

A pair's key orders as `kernels.mra.reference.select_blocks` does: class (occupied, priors), then the bits of the
float32 max S − S ≥ 0. Counts are integers: atomic additions of them give the same result in every order.
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
from kernels.common.tiles import NEVER, load_rows, place, product, real_rows, window_weights

LOG2E = tl.constexpr(1.4426950408889634)
DIGIT = tl.constexpr(7)
LEVELS = tl.constexpr(5)
BINS = tl.constexpr(128)
POOL_TOKENS = 128
ROWS = 16
"""Block rows of one program of a selection pass."""


class Selection(NamedTuple):
    """What the selection leaves to the other passes; x and y are query and key blocks, W = ⌈nb / 32⌉."""

    means: Tensor  # (3, B·H, nb, D') of q, k, v
    counts: Tensor  # (B·H, nb) real tokens
    bits: Tensor  # (B·H, nb, W) int32: bit y mod 32 of word y // 32 is set where (x, y) is refined
    words: Tensor  # (B·H, ⌈nb / ROWS⌉, W) int32: bits set in ROWS rows of a word
    starts: Tensor  # (B·H, nb + 1) int32: where the list of x begins in `listed`
    listed: Tensor  # (B·H, m) int32: the y refined for each x, ascending


@triton.jit
def pool_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    mean_ptr, count_ptr, digits_ptr, mean_stride,
    length, num_heads, num_blocks, parts,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Means of the blocks of TOKENS tokens, and zeros for the counters of the radix select."""
    b, h, part = place(tl.program_id(0), num_heads, parts)
    head = b * num_heads + h
    wide_h = h.to(tl.int64)
    offset_n, offset_d = tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    start = part * TOKENS
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK)
    weight = window_weights(real, BLOCK, TOKENS, COMPUTE)[:, None]
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)

    WINDOWS: tl.constexpr = TOKENS // BLOCK
    block = part * WINDOWS + tl.arange(0, WINDOWS)
    inside = block < num_blocks
    counts = tl.sum(tl.reshape(tl.where(real, 1.0, 0.0).to(COMPUTE), (WINDOWS, BLOCK)), axis=1)
    tl.store(count_ptr + head * num_blocks + block, counts, mask=inside)
    mean_ptr += (head * num_blocks + block[:, None]) * BLOCK_D + offset_d[None, :]
    shape: tl.constexpr = (WINDOWS, BLOCK, BLOCK_D)
    tl.store(mean_ptr, tl.sum(tl.reshape(q.to(COMPUTE) * weight, shape), axis=1), mask=inside[:, None])
    mean_ptr += mean_stride
    tl.store(mean_ptr, tl.sum(tl.reshape(k.to(COMPUTE) * weight, shape), axis=1), mask=inside[:, None])
    mean_ptr += mean_stride
    tl.store(mean_ptr, tl.sum(tl.reshape(v.to(COMPUTE) * weight, shape), axis=1), mask=inside[:, None])
    if part == 0:
        counter = tl.arange(0, 8 * BINS)
        tl.store(digits_ptr + head * LEVELS * BINS + counter, 0, mask=counter < LEVELS * BINS)


@triton.jit
def load_means(ptr, head, num_blocks, block, BLOCK_D: tl.constexpr):
    """Rows `block` of the means of one head, zero behind the last."""
    offset_d = tl.arange(0, BLOCK_D)
    position = (head * num_blocks + block[:, None]) * BLOCK_D + offset_d[None, :]
    return tl.load(ptr + position, mask=(block < num_blocks)[:, None], other=0.0)


@triton.jit
def scores_kernel(
    mean_q_ptr, mean_k_ptr, count_ptr, score_ptr, peak_ptr, num_blocks, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S of ROWS block rows, and the maximum of each over blocks with real tokens."""
    pid = tl.program_id(0)
    head = (pid // tiles).to(tl.int64)
    x = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    mean_q = load_means(mean_q_ptr, head, num_blocks, x, BLOCK_D)
    peak = tl.full((ROWS,), NEVER, COMPUTE)
    score_row = score_ptr + (head * num_blocks + x[:, None]) * num_blocks
    for first in range(0, num_blocks, CHUNK):
        y = first + tl.arange(0, CHUNK)
        mean_k = load_means(mean_k_ptr, head, num_blocks, y, BLOCK_D)
        count = tl.load(count_ptr + head * num_blocks + y, mask=y < num_blocks, other=0.0)
        score = product(mean_q, tl.trans(mean_k), COMPUTE, COMPUTE, PRECISION) * (HEAD_DIM**-0.5)
        tl.store(score_row + y[None, :], score, mask=(x < num_blocks)[:, None] & (y < num_blocks)[None, :])
        peak = tl.maximum(peak, tl.max(tl.where((count > 0)[None, :], score, NEVER), axis=1))
    tl.store(peak_ptr + head * num_blocks + x, peak, mask=x < num_blocks)


@triton.jit
def load_pairs(
    score_ptr, peak_ptr, count_ptr, head, num_blocks, x, y, FIRST: tl.constexpr, DIAGONAL: tl.constexpr
):
    """Score, key and presence of the pairs (x, y) of a head; a smaller key is a better pair.

    The key has 35 bits: 3 of the class (3 less the priors met; 4 without real tokens on both sides), 31 of max S − S
    without its sign, and a zero. A NaN orders behind every number.
    """
    inside = (x < num_blocks)[:, None] & (y < num_blocks)[None, :]
    position = (head * num_blocks + x[:, None]) * num_blocks + y[None, :]
    score = tl.load(score_ptr + position, mask=inside, other=0.0)
    peak = tl.load(peak_ptr + head * num_blocks + x, mask=x < num_blocks, other=0.0)
    count_x = tl.load(count_ptr + head * num_blocks + x, mask=x < num_blocks, other=0.0)
    count_y = tl.load(count_ptr + head * num_blocks + y, mask=y < num_blocks, other=0.0)
    occupied = (count_x > 0)[:, None] & (count_y > 0)[None, :]
    drop = (peak[:, None] - score).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    grade = tl.where(occupied, 3, 4)
    if FIRST > 0:
        grade -= ((x < FIRST)[:, None] & occupied).to(tl.int32) + ((y < FIRST)[None, :] & occupied).to(tl.int32)
    if DIAGONAL > 0:
        grade -= ((tl.abs(x[:, None] - y[None, :]) <= DIAGONAL // 2) & occupied).to(tl.int32)
    key = (grade.to(tl.int64) << 32) | (tl.where(occupied, drop, 0).to(tl.int64) << 1)
    return score, key, inside


@triton.jit
def leading_digits(digits_ptr, head, budget, LEVEL: tl.constexpr):
    """The first LEVEL digits of the key of pair number `budget`, and its number among the pairs that share them."""
    digit = tl.arange(0, BINS)
    rank, prefix = budget, tl.zeros((), tl.int64)
    for level in tl.static_range(LEVEL):
        count = tl.load(digits_ptr + (head * LEVELS + level) * BINS + digit)
        found = tl.sum((tl.cumsum(count, axis=0) < rank).to(tl.int32))
        rank -= tl.sum(tl.where(digit < found, count, 0))
        prefix = prefix * BINS + found
    return prefix, rank


@triton.jit
def digits_kernel(
    score_ptr, peak_ptr, count_ptr, digits_ptr, num_blocks, tiles, budget,
    LEVEL: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How often each value of digit LEVEL occurs in the keys that share the digits before it."""
    pid = tl.program_id(0)
    head = (pid // tiles).to(tl.int64)
    x = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    prefix, rank = leading_digits(digits_ptr, head, budget, LEVEL)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, num_blocks, CHUNK):
        y = first + tl.arange(0, CHUNK)
        score, key, inside = load_pairs(score_ptr, peak_ptr, count_ptr, head, num_blocks, x, y, FIRST, DIAGONAL)
        digits = key >> (DIGIT * (LEVELS - 1 - LEVEL))
        if LEVEL > 0:
            inside = inside & ((digits >> DIGIT) == prefix)
        digits = tl.reshape((digits & (BINS - 1)).to(tl.int32), (ROWS * CHUNK,))
        counts += tl.histogram(digits, BINS, mask=tl.reshape(inside, (ROWS * CHUNK,)))
    digit = tl.arange(0, BINS)
    tl.atomic_add(digits_ptr + (head * LEVELS + LEVEL) * BINS + digit, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def tally_kernel(
    score_ptr, peak_ptr, count_ptr, digits_ptr, tally_ptr, num_blocks, tiles, budget,
    FIRST: tl.constexpr, DIAGONAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Pairs of each row that are better than pair number `budget`, and that tie with it: (B·H, 2, nb)."""
    pid = tl.program_id(0)
    head = (pid // tiles).to(tl.int64)
    x = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    threshold, rank = leading_digits(digits_ptr, head, budget, LEVELS)
    better, tied = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
    for first in range(0, num_blocks, CHUNK):
        y = first + tl.arange(0, CHUNK)
        score, key, inside = load_pairs(score_ptr, peak_ptr, count_ptr, head, num_blocks, x, y, FIRST, DIAGONAL)
        better += tl.sum((inside & (key < threshold)).to(tl.int32), axis=1)
        tied += tl.sum((inside & (key == threshold)).to(tl.int32), axis=1)
    tally_ptr += 2 * head * num_blocks + x
    tl.store(tally_ptr, better, mask=x < num_blocks)
    tl.store(tally_ptr + num_blocks, tied, mask=x < num_blocks)


@triton.jit
def row_shares(tally_ptr, head, num_blocks, first, quota, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Where the lists of the rows first … first + ROWS − 1 begin, and how many ties each takes; ties go in order."""
    tally_ptr += 2 * head * num_blocks
    better_before, tied_before = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.int32)
    for start in range(0, first, CHUNK):
        row = start + tl.arange(0, CHUNK)
        better_before += tl.load(tally_ptr + row, mask=row < first, other=0)
        tied_before += tl.load(tally_ptr + num_blocks + row, mask=row < first, other=0)
    x = first + tl.arange(0, ROWS)
    better = tl.load(tally_ptr + x, mask=x < num_blocks, other=0)
    tied = tl.load(tally_ptr + num_blocks + x, mask=x < num_blocks, other=0)
    better_before = tl.sum(better_before) + tl.cumsum(better, axis=0) - better
    tied_before = tl.sum(tied_before) + tl.cumsum(tied, axis=0) - tied
    taken_before = tl.minimum(tied_before, quota)
    return better_before + taken_before, tl.minimum(tied, quota - taken_before)


@triton.jit
def finish_kernel(
    score_ptr, peak_ptr, count_ptr, mean_v_ptr, digits_ptr, tally_ptr,
    bits_ptr, words_ptr, start_ptr, listed_ptr, coarse_peak_ptr, coarse_mass_ptr, coarse_sum_ptr,
    num_blocks, tiles, budget,
    FULL: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bits and lists of ROWS block rows; with FULL also what their unrefined pairs add to the output.

    peak = log₂ max e^S, mass = Σ c_y e^S / 2^peak, sum = Σ c_y e^S v̄_y / 2^peak, all over y not refined.
    """
    pid = tl.program_id(0)
    head, tile = (pid // tiles).to(tl.int64), pid % tiles
    x = tile * ROWS + tl.arange(0, ROWS)
    offset_d, words = tl.arange(0, BLOCK_D), tl.cdiv(num_blocks, 32)
    threshold, quota = leading_digits(digits_ptr, head, budget, LEVELS)
    begin, ties = row_shares(tally_ptr, head, num_blocks, tile * ROWS, quota, ROWS, CHUNK)
    tl.store(start_ptr + head * (num_blocks + 1) + x, begin, mask=x < num_blocks)
    if tile == 0:
        tl.store(start_ptr + head * (num_blocks + 1) + num_blocks, budget)
    tied_seen, chosen_seen = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
    peak, mass = tl.full((ROWS,), NEVER, COMPUTE), tl.zeros((ROWS,), COMPUTE)
    total = tl.zeros((ROWS, BLOCK_D), COMPUTE)
    for first in range(0, num_blocks, CHUNK):
        y = first + tl.arange(0, CHUNK)
        score, key, inside = load_pairs(score_ptr, peak_ptr, count_ptr, head, num_blocks, x, y, FIRST, DIAGONAL)
        tied = (inside & (key == threshold)).to(tl.int32)
        rank = tied_seen[:, None] + tl.cumsum(tied, axis=1)
        chosen = ((inside & (key < threshold)) | ((tied > 0) & (rank <= ties[:, None]))).to(tl.int32)
        place_in_row = chosen_seen[:, None] + tl.cumsum(chosen, axis=1) - 1
        target = listed_ptr + head * budget + begin[:, None] + place_in_row
        tl.store(target, tl.broadcast_to(y[None, :], (ROWS, CHUNK)), mask=chosen > 0)
        tied_seen += tl.sum(tied, axis=1)
        chosen_seen += tl.sum(chosen, axis=1)

        by_word = tl.reshape(chosen, (ROWS, CHUNK // 32, 32))
        packed = tl.sum(by_word << tl.arange(0, 32)[None, None, :], axis=2)
        word = first // 32 + tl.arange(0, CHUNK // 32)
        position = (head * num_blocks + x[:, None]) * words + word[None, :]
        tl.store(bits_ptr + position, packed, mask=(x < num_blocks)[:, None] & (word < words)[None, :])
        tl.store(words_ptr + (head * tiles + tile) * words + word, tl.sum(tl.sum(by_word, axis=2), axis=0),
                 mask=word < words)  # fmt: skip
        if FULL:
            count = tl.load(count_ptr + head * num_blocks + y, mask=y < num_blocks, other=0.0)
            visible = (chosen == 0) & (count > 0)[None, :]
            logits = tl.where(visible, score * LOG2E, -float("inf"))
            higher = tl.maximum(peak, tl.max(logits, axis=1))
            weights = tl.exp2(logits - higher[:, None]) * count[None, :]
            scale = tl.exp2(peak - higher)
            mean_v = load_means(mean_v_ptr, head, num_blocks, y, BLOCK_D)
            total = total * scale[:, None] + product(weights, mean_v, COMPUTE, OPERAND, PRECISION)
            mass = mass * scale + tl.sum(weights, axis=1)
            peak = higher
    if FULL:
        row = head * num_blocks + x
        tl.store(coarse_peak_ptr + row, peak, mask=x < num_blocks)
        tl.store(coarse_mass_ptr + row, mass, mask=x < num_blocks)
        tl.store(coarse_sum_ptr + row[:, None] * BLOCK_D + offset_d[None, :], total, mask=(x < num_blocks)[:, None])


@triton.jit
def columns_kernel(
    bits_ptr, words_ptr, start_ptr, listed_ptr, num_blocks, tiles, budget, BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The list of x refined for each y, ascending, for the 32 y of one word of bits."""
    words = tl.cdiv(num_blocks, 32)
    pid = tl.program_id(0)
    head, word = (pid // words).to(tl.int64), pid % words
    bit = tl.arange(0, 32)
    y = word * 32 + bit
    before = tl.zeros((BLOCK_T,), tl.int32)
    words_ptr += head * tiles * words
    for first in range(0, tiles * words, BLOCK_T):
        slot = first + tl.arange(0, BLOCK_T)
        before += tl.load(words_ptr + slot, mask=(slot < tiles * words) & (slot % words < word), other=0)
    counts = tl.zeros((32,), tl.int32)
    for first in range(0, num_blocks, ROWS):
        x = first + tl.arange(0, ROWS)
        packed = tl.load(bits_ptr + (head * num_blocks + x) * words + word, mask=x < num_blocks, other=0)
        counts += tl.sum((packed[:, None] >> bit[None, :]) & 1, axis=0)
    begin = tl.sum(before) + tl.cumsum(counts, axis=0) - counts
    tl.store(start_ptr + head * (num_blocks + 1) + y, begin, mask=y < num_blocks)
    if word == 0:
        tl.store(start_ptr + head * (num_blocks + 1) + num_blocks, budget)
    seen = begin
    for first in range(0, num_blocks, ROWS):
        x = first + tl.arange(0, ROWS)
        packed = tl.load(bits_ptr + (head * num_blocks + x) * words + word, mask=x < num_blocks, other=0)
        chosen = (packed[:, None] >> bit[None, :]) & 1
        target = listed_ptr + head * budget + seen[None, :] + tl.cumsum(chosen, axis=0) - 1
        tl.store(target, tl.broadcast_to(x[:, None], (ROWS, 32)), mask=chosen > 0)
        seen += tl.sum(chosen, axis=0)


# ------------------------------------------------------------------------------------------------------------ launches


def score_precision(dtype: torch.dtype) -> str:
    """Precision of products of block means: as good as float32, on tensor cores for the half precisions."""
    return "tf32x3" if dtype in (torch.bfloat16, torch.float16) else "ieee"


def select(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, full: bool, block_size: int, budget: int,
    first_blocks: int, diagonal_blocks: int,
) -> tuple[Selection, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The `budget` pairs of every head, and with `full` the coarse peak, mass (B·H, nb) and sum (B·H, nb, D')."""
    batch, heads, length, dim = q.shape
    sequences, width, num_blocks = batch * heads, block_dim(dim), triton.cdiv(length, block_size)
    kinds, precision = arithmetic(q.dtype), score_precision(q.dtype)
    state, whole = (dict(dtype=t, device=q.device) for t in (state_dtype(q.dtype), torch.int32))
    means, counts = torch.empty(3, sequences, num_blocks, width, **state), torch.empty(sequences, num_blocks, **state)
    digits = torch.empty(sequences, LEVELS.value, BINS.value, **whole)
    parts = triton.cdiv(length, POOL_TOKENS)
    pool_kernel[(sequences * parts,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask_arguments(key_mask, q), means, counts, digits,
        means.stride(0), length, heads, num_blocks, parts,
        HAS_MASK=key_mask is not None, BLOCK=block_size, TOKENS=POOL_TOKENS, HEAD_DIM=dim, BLOCK_D=width,
        COMPUTE=kinds["COMPUTE"], num_warps=4,
    )  # fmt: skip

    tiles, chunk = triton.cdiv(num_blocks, ROWS), min(128, max(32, triton.next_power_of_2(num_blocks)))
    grid, shape = (sequences * tiles,), dict(ROWS=ROWS, CHUNK=chunk, num_warps=4)
    priors = dict(FIRST=first_blocks, DIAGONAL=diagonal_blocks)
    scores, peaks = torch.empty(sequences, num_blocks, num_blocks, **state), torch.empty_like(counts)
    scores_kernel[grid](
        means[0], means[1], counts, scores, peaks, num_blocks, tiles,
        HEAD_DIM=dim, BLOCK_D=width, COMPUTE=kinds["COMPUTE"], PRECISION=precision, **shape,
    )  # fmt: skip
    for level in range(LEVELS.value):
        digits_kernel[grid](scores, peaks, counts, digits, num_blocks, tiles, budget, LEVEL=level, **priors, **shape)
    tally = torch.empty(sequences, 2, num_blocks, **whole)
    tally_kernel[grid](scores, peaks, counts, digits, tally, num_blocks, tiles, budget, **priors, **shape)
    words = triton.cdiv(num_blocks, 32)
    chosen = Selection(
        means=means, counts=counts, bits=torch.empty(sequences, num_blocks, words, **whole),
        words=torch.empty(sequences, tiles, words, **whole), starts=torch.empty(sequences, num_blocks + 1, **whole),
        listed=torch.empty(sequences, budget, **whole),
    )  # fmt: skip
    coarse = (torch.empty_like(counts), torch.empty_like(counts), torch.empty_like(means[0])) if full else None
    finish_kernel[grid](
        scores, peaks, counts, means[2], digits, tally, chosen.bits, chosen.words, chosen.starts, chosen.listed,
        *(coarse or (counts,) * 3), num_blocks, tiles, budget,
        FULL=full, **priors, BLOCK_D=width, **shape, COMPUTE=kinds["COMPUTE"], OPERAND=kinds["COMPUTE"],
        PRECISION=kinds["PRECISION"],
    )  # fmt: skip
    return chosen, coarse or (counts,) * 3


def transpose(chosen: Selection) -> tuple[Tensor, Tensor]:
    """Starts (B·H, nb + 1) and lists (B·H, m) of the x refined for each y."""
    starts, listed = torch.empty_like(chosen.starts), torch.empty_like(chosen.listed)
    sequences, num_blocks, words = chosen.bits.shape
    columns_kernel[(sequences * words,)](
        chosen.bits, chosen.words, starts, listed, num_blocks, chosen.words.shape[1], listed.shape[1],
        BLOCK_T=256, ROWS=min(128, max(16, triton.next_power_of_2(num_blocks))), num_warps=4,
    )  # fmt: skip
    return starts, listed
