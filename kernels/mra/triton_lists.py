"""The refined pairs as bits and lists, and what all the others add to the output.

finish   bits and lists by query block, in order; sums and weights of the unrefined pairs
columns  the lists by key block, for the backward pass
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import arithmetic, block_dim
from kernels.common.tiles import LOG2E, NEVER, product
from kernels.mra.triton_pool import load_means, pool
from kernels.mra.triton_select import ROWS, load_keys, rank

FINISH = (64, 4)


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


def select(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, full: bool, block_size: int, budget: int,
    first_blocks: int, diagonal_blocks: int,
) -> tuple[Selection, tuple[Tensor, Tensor]]:  # fmt: skip
    """The `budget` pairs of every head, and with `full` the coarse mass (B·H, P) and sum (B·H, P, D')."""
    dim, order = q.shape[3], dict(FIRST=first_blocks, DIAGONAL=diagonal_blocks)
    means, counts = pool(q, k, v, key_mask, block_size)
    ranking = rank(means, counts, triton.cdiv(q.shape[2], block_size), budget, dim, q.dtype, order)
    sequences, side = counts.shape
    whole = dict(dtype=torch.int32, device=q.device)
    chosen = Selection(
        means=means, counts=counts, bits=torch.empty(sequences, side, side // 32, **whole), words=ranking.words,
        starts=torch.empty(sequences, side + 1, **whole), listed=torch.empty(sequences, budget, **whole),
        peaks=torch.empty_like(counts), weights=weights_like(counts, q.dtype, full),
    )  # fmt: skip
    mass, sums = (torch.empty_like(counts), torch.empty_like(means[0])) if full else (counts, counts)
    finish_kernel[(sequences * (side // ROWS),)](
        ranking.drops, ranking.peaks, ranking.rest, counts, means[2], ranking.tally, ranking.threshold,
        chosen.bits, chosen.words, chosen.starts, chosen.listed, chosen.peaks, mass, sums, chosen.weights,
        side, side // ROWS, budget,
        FULL=full, **order, ROWS=ROWS, CHUNK=min(FINISH[0], side), BLOCK_D=block_dim(dim), **arithmetic(q.dtype),
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
