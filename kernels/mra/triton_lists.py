"""The refined pairs as bits and lists, and what all the others add to the output.

finish   bits, and lists by query block; sums and weights of the unrefined pairs
columns  the lists by key block, for the backward pass

One pair in 8 to 64 is refined, so lists are made from words of 32 bits, not from pairs: where the list of a word begins
is a sum of bits set, and its steps are as many as the fullest word of a tile has.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import COUNTS, arithmetic, block_dim
from kernels.common.tiles import LOG2E, NEVER, ones_of, product
from kernels.mra.triton_pool import load_means, operand_dtype, pool
from kernels.mra.triton_select import load_keys, rank

FINISH = (128, 4)
"""Columns of a step of `finish`, and its most warps."""

ROWS = 32
"""Block rows of a program of `finish`: the bits of a word."""

PREFIX = tl.constexpr(128)
"""Rows whose tally is summed at once."""


class Selection(NamedTuple):
    """What the selection leaves to the other passes; x and y are query and key blocks, P padded blocks, W = P / 32."""

    means: Tensor  # (3, B·H, P, D') of q, k, v, as products take them
    counts: Tensor  # (B·H, P) real tokens
    bits: Tensor  # (B·H, W, P) int32: bit x mod 32 of word (x // 32, y) is set where (x, y) is refined
    words: Tensor  # (B·H, W) int32: pairs refined in 32 columns
    starts: Tensor  # (B·H, P + 1) int32: where the list of x begins in `listed`, and the end of the last
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
def list_bits(listed_ptr, slot, bits, first):
    """Lists the bits set in each int32, ascending and counted from `first`, from `slot` on."""
    while tl.max((bits != 0).to(tl.int32)) > 0:
        lowest = bits & -bits
        number = (lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(listed_ptr + slot, first + number, mask=bits != 0)
        bits ^= lowest
        slot += 1


@triton.jit
def least_drop(rest, threshold, left):
    """The least drop of the unrefined pairs of each row, of which ties with the threshold are some where `left`."""
    level = threshold.to(tl.uint32).to(tl.float32, bitcast=True)
    level = tl.where(left, level, -1.0)
    return tl.where(level >= 0, tl.minimum(rest, level), rest)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def finish_kernel(
    drop_ptr, peak_ptr, rest_ptr, count_ptr, mean_v_ptr, tally_ptr, threshold_ptr,
    bits_ptr, words_ptr, start_ptr, listed_ptr, coarse_peak_ptr, coarse_mass_ptr, coarse_sum_ptr, weight_ptr,
    side, tiles, budget,
    FULL: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lists of 32 block rows, their bits by column, and with FULL what their unrefined pairs add to the output.

    peak = log₂ max e^S, weights = c_y e^S / 2^peak, mass = Σ weights, sum = Σ weights v̄_y, over all y not refined.
    """
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    x = tile * ROWS + tl.arange(0, ROWS)
    row, words = head * side + x, side // 32
    threshold, quota = tl.load(threshold_ptr + 2 * head), tl.load(threshold_ptr + 2 * head + 1).to(tl.int32)
    begin, tied_in_row, ties = row_shares(tally_ptr, head, side, tile * ROWS, quota, ROWS, PREFIX)
    tl.store(start_ptr + head * (side + 1) + x, begin)
    parted = tl.max(((ties > 0) & (ties < tied_in_row)).to(tl.int32)) > 0
    tied_before, mass = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), COMPUTE)
    total = tl.zeros((ROWS, BLOCK_D), COMPUTE)
    rest = least_drop(tl.load(rest_ptr + row), threshold, tied_in_row > ties)
    for first in range(0, side, CHUNK):
        y = first + tl.arange(0, CHUNK)
        drop, key = load_keys(drop_ptr, head, x, y, side, FIRST, DIAGONAL)
        tied = (key == threshold.to(key.dtype)) & (ties > 0)[:, None]
        if parted:
            rank = tied_before[:, None] + tl.cumsum(tied.to(tl.int32), axis=1)
            tied_before += tl.sum(tied.to(tl.int32), axis=1)
            tied = tied & (rank <= ties[:, None])
        chosen = (key < threshold.to(key.dtype)) | tied

        one = chosen.to(tl.int32)
        tl.store(bits_ptr + (head * words + tile) * side + y, tl.sum(one << (x % 32)[:, None], axis=0))
        bits = tl.sum(tl.reshape(one << (y % 32)[None, :], (ROWS, CHUNK // 32, 32)), axis=2)
        count, word = ones_of(bits), first // 32 + tl.arange(0, CHUNK // 32)
        tl.atomic_add(words_ptr + head * words + word, tl.sum(count, axis=0), sem="relaxed")
        list_bits(listed_ptr + head * budget, begin[:, None] + tl.cumsum(count, axis=1) - count, bits, word * 32)
        begin += tl.sum(count, axis=1)
        if FULL:
            count_y, mean_v = tl.load(count_ptr + head * side + y), load_means(mean_v_ptr, head * side + y, BLOCK_D)
            logits = tl.where(chosen | (drop < 0), -float("inf"), (rest[:, None] - drop) * LOG2E)
            weights = tl.exp2(logits) * count_y[None, :]
            tl.store(weight_ptr + row[:, None] * side + y[None, :], weights.to(OPERAND))
            total += product(weights, mean_v, COMPUTE, OPERAND, PRECISION)
            mass += tl.sum(weights, axis=1)
    if tile == tiles - 1:
        tl.store(start_ptr + head * (side + 1) + side, tl.max(begin))
    if FULL:
        peak = tl.where(rest < float("inf"), (tl.load(peak_ptr + row) - rest) * LOG2E, NEVER)
        tl.store(coarse_peak_ptr + row, peak)
        tl.store(coarse_mass_ptr + row, mass)
        tl.store(coarse_sum_ptr + row[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], total)


@triton.jit
def columns_kernel(bits_ptr, words_ptr, start_ptr, listed_ptr, side, budget, BLOCK_W: tl.constexpr):
    """The list of x refined for each of 32 y, ascending."""
    words = side // 32
    head, group = (tl.program_id(0) // words).to(tl.int64), tl.program_id(0) % words
    word, y = tl.arange(0, BLOCK_W), group * 32 + tl.arange(0, 32)
    before = tl.sum(tl.load(words_ptr + head * words + word, mask=word < group, other=0))
    position = bits_ptr + (head * words + word)[:, None] * side + y[None, :]
    bits = tl.load(position, mask=(word < words)[:, None], other=0)
    count = ones_of(bits)
    refined = tl.sum(count, axis=0)
    begin = before + tl.cumsum(refined, axis=0) - refined
    tl.store(start_ptr + head * (side + 1) + y, begin)
    if group == words - 1:
        tl.store(start_ptr + head * (side + 1) + side, before + tl.sum(refined))
    slot = begin[None, :] + tl.cumsum(count, axis=0) - count
    list_bits(listed_ptr + head * budget, slot, bits, 32 * word[:, None])


# ------------------------------------------------------------------------------------------------------------ launches


def select(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, full: bool, block_size: int, budget: int,
    first_blocks: int, diagonal_blocks: int,
) -> tuple[Selection, tuple[Tensor, Tensor]]:  # fmt: skip
    """The `budget` pairs of every head, and with `full` the coarse mass (B·H, P) and sum (B·H, P, D')."""
    dim, order = q.shape[3], dict(FIRST=first_blocks, DIAGONAL=diagonal_blocks)
    means, operands, counts = pool(q, k, v, key_mask, block_size)
    ranking = rank(means, counts, triton.cdiv(q.shape[2], block_size), budget, dim, q.dtype, order)
    sequences, side = counts.shape
    whole = dict(dtype=torch.int32, device=q.device)
    chosen = Selection(
        means=operands, counts=counts, bits=torch.empty(sequences, side // 32, side, **whole), words=ranking.words,
        starts=torch.empty(sequences, side + 1, **whole), listed=torch.empty(sequences, budget, **whole),
        peaks=torch.empty_like(counts), weights=weights_like(counts, q.dtype, full),
    )  # fmt: skip
    chunk = min(FINISH[0], side)
    mass, sums = (torch.empty_like(counts), torch.empty_like(means[0])) if full else (counts, counts)
    finish_kernel[(sequences * (side // ROWS),)](
        ranking.drops, ranking.peaks, ranking.rest, counts, operands[2], ranking.tally, ranking.threshold,
        chosen.bits, chosen.words, chosen.starts, chosen.listed, chosen.peaks, mass, sums, chosen.weights,
        side, side // ROWS, budget,
        FULL=full, **order, ROWS=ROWS, CHUNK=chunk, BLOCK_D=block_dim(dim), **arithmetic(q.dtype),
        num_warps=max(1, min(FINISH[1], chunk // 32)), num_stages=2,
    )  # fmt: skip
    return chosen, (mass, sums)


def weights_like(counts: Tensor, dtype: torch.dtype, full: bool) -> Tensor:
    """Room for the weights of the unrefined pairs, in what products with them multiply in: (B·H, P, P), or empty."""
    side = counts.shape[1] if full else 0
    return counts.new_empty(len(counts), side, side, dtype=operand_dtype(dtype))


def transpose(chosen: Selection) -> tuple[Tensor, Tensor]:
    """Starts (B·H, P + 1) and lists (B·H, m) of the x refined for each y."""
    starts, listed = torch.empty_like(chosen.starts), torch.empty_like(chosen.listed)
    sequences, words, side = chosen.bits.shape
    columns_kernel[(sequences * words,)](
        chosen.bits, chosen.words, starts, listed, side, listed.shape[1],
        BLOCK_W=triton.next_power_of_2(words), num_warps=max(1, min(words // 8, 8)),
    )  # fmt: skip
    return starts, listed
