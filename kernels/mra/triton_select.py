"""The choice of the pairs to refine: the key of pair number m of a head, without a host round trip.

    rank     S = τ q̄ k̄ᵀ, and of each row max S − S, which orders the pairs; bounds of the key of pair number m, from
             samples of a head that each fit the registers of a program
    narrow   the keys between the bounds
    settle   the key of pair number m, among them
    tally    how many pairs of each row are better than it, and how many tie with it

Up to 128 blocks the sample is the head, and rank does it all. Else a head is read four times, and written once: P²
numbers in float32. Where fewer pairs have real tokens on both sides, no others fill the choice up: nothing of them
would be read, and the rows that hold them would be walked longest.

A pair's key orders as `kernels.mra.reference.select_blocks` does: class (occupied, priors), then the bits of the
float32 max S − S ≥ 0. It is computed once and read from memory afterwards, so that all passes agree in its last bit.
Counts are integers: atomic additions of them give the same result in every order.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import arithmetic, block_dim
from kernels.common.tiles import NEVER, product
from kernels.mra.triton_pool import load_means

PAIRS = 16384
"""Pairs that one program ranks: their keys are in its registers."""

CHUNK = 512
"""Most columns of a tile of pairs."""

MEANS = 16384
"""Most numbers of k̄ that a program holds at once: twice, in flight, they share the shared memory with those of q̄."""

CANDIDATES = 8192
"""Keys that settle holds in registers; more of them are read again for each bisection."""

ROWS = 16
"""Rows of a program of `tally`."""

SLACK = tl.constexpr(1 << 17)
"""How exact the search in a sample is, in steps of a float32: 0.8 to 1.6 percent of max S − S."""

MARGIN = tl.constexpr(1 << 21)
"""How far apart the bounds of a sample are, in such steps: groups with two keys before the bound loosen it."""

GROUP = 8
"""Most keys of a sample of which the least stands for all; no more than a quarter of the groups is to have a key."""


class Ranking(NamedTuple):
    """Where the pairs of a head stand; P padded blocks."""

    drops: Tensor  # (B·H, P, P): max S − S ≥ 0 of each row; −1 without real tokens on both sides, −2 behind the end
    peaks: Tensor  # (B·H, P): the max S of each row
    threshold: Tensor  # (B·H, 2) int64: the key of pair number m, and how many pairs with that key are refined
    tally: Tensor  # (B·H, 2, P) int32: pairs of each row that are better, and that have that key
    rest: Tensor  # (B·H, P): the least drop of each row that comes behind, else inf
    words: Tensor  # (B·H, P / 32) int32 zeros


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
def sample_bounds(key, rank, last, ROWS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """Bounds of key number `rank` of a tile, which is at most `last`, by a search among the least of GROUP keys each.

    At least `rank` keys are up to the upper bound: so many groups have one. The lower bound is a guess, and counted.
    """
    least = tl.min(tl.reshape(key, (ROWS, GROUP, CHUNK // GROUP)), axis=1)
    _, high = bisect(least, rank, last * 0, last, SLACK)
    low = tl.maximum(high - MARGIN, 0)
    before = tl.sum((key < low.to(key.dtype)).to(tl.int32))
    return tl.where(before < rank, low, 0), high


@triton.jit
def store_threshold(threshold_ptr, words_ptr, head, side, threshold, quota, BITS: tl.constexpr):
    """(B·H, 2) int64: the key of pair number m, and how many pairs with that key are refined; zeros for `words`."""
    tl.store(threshold_ptr + 2 * head, threshold)
    without_tokens = threshold >> BITS - 1 > 0
    tl.store(threshold_ptr + 2 * head + 1, tl.where(without_tokens, 0, quota).to(tl.int64))
    words = side // 32
    for first in range(0, words, 128):
        word = first + tl.arange(0, 128)
        tl.store(words_ptr + head * words + word, 0, mask=word < words)


@triton.jit
def tallies(drop, key, threshold):
    """Of each row of a tile: pairs with keys before the threshold, pairs with it, the least drop of those behind it."""
    better, tied = key < threshold.to(key.dtype), key == threshold.to(key.dtype)
    rest = tl.where(better | tied | (drop < 0), float("inf"), drop)
    both = tl.sum(better.to(tl.int32) + (tied.to(tl.int32) << 16), axis=1)  # one sum for two counts
    return both & 0xFFFF, both >> 16, tl.min(rest, axis=1)


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
    CHUNKS: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
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
        if WHOLE:
            low, high = bisect(key, share, last * 0, last, 0)
        else:
            low, high = sample_bounds(key, share, last, ROWS, CHUNK, GROUP)
        part = 2 * ((head * tiles + tile) * CHUNKS + chunk)
        tl.store(bound_ptr + part, low)
        tl.store(bound_ptr + part + 1, high)
        if WHOLE:
            better, tied, rest = tallies(drop, key, high)
            store_threshold(threshold_ptr, words_ptr, head, side, high, share - tl.sum(better), BITS)
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
    """Gathers the keys from the least bound to before the greatest, and counts those before them.

    A program takes room for its keys at once, in any order of the programs: what settle finds does not depend on it.
    """
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    pair = tile * SIZE + tl.arange(0, SIZE)
    first = head * side * side
    key = pair_keys(tl.load(drop_ptr + first + pair), pair // side, pair % side, FIRST, DIAGONAL)
    low, high = outer_bounds(bound_ptr, head, parts, PARTS)
    before = key < low.to(key.dtype)
    between = (key < high.to(key.dtype)) & (key >= low.to(key.dtype))
    tl.atomic_add(found_ptr + 2 * head, tl.sum(before.to(tl.int32)), sem="relaxed")
    count = between.to(tl.int32)
    begin = tl.atomic_add(found_ptr + 2 * head + 1, tl.sum(count), sem="relaxed")
    tl.store(candidate_ptr + first + begin + tl.cumsum(count, axis=0) - 1, key, mask=between)


@triton.jit
def count_candidates(candidate_ptr, number, bound, SIZE: tl.constexpr):
    """How many of `number` keys are before `bound`."""
    seen = tl.zeros((SIZE,), tl.int32)
    for first in range(0, number, SIZE):
        place = first + tl.arange(0, SIZE)
        key = tl.load(candidate_ptr + place, mask=place < number, other=0)
        seen += ((key < bound.to(key.dtype)) & (place < number)).to(tl.int32)
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
            enough = count_candidates(candidate_ptr, number, middle + 1, SIZE) >= rank
            low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
        before = count_candidates(candidate_ptr, number, high, SIZE)
    store_threshold(threshold_ptr, words_ptr, head, side, high, rank - before, BITS)


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


# ------------------------------------------------------------------------------------------------------------ launches


def score_precision(dtype: torch.dtype) -> str:
    """Precision of products of block means: as good as float32, on tensor cores for the half precisions."""
    return "tf32x3" if dtype in (torch.bfloat16, torch.float16) else "ieee"


def rank(
    means: Tensor, counts: Tensor, num_blocks: int, budget: int, dim: int, dtype: torch.dtype, order: dict[str, int]
) -> Ranking:
    """The ranking of the pairs of every head for a choice of `budget`; `order` has the priors FIRST and DIAGONAL."""
    sequences, side = counts.shape
    width = block_dim(dim)
    chunk = min(CHUNK, side, MEANS // width)
    rows = min(side, max(16, PAIRS // chunk))
    tiles, chunks = side // rows, side // chunk
    parts, bits = tiles * chunks, 35 if any(order.values()) else 32
    share = triton.cdiv(budget, parts)
    whole, wide = (dict(dtype=kind, device=counts.device) for kind in (torch.int32, torch.int64))
    ranking = Ranking(
        drops=counts.new_empty(sequences, side, side), peaks=torch.empty_like(counts),
        threshold=torch.empty(sequences, 2, **wide), tally=torch.empty(sequences, 2, side, **whole),
        rest=torch.empty_like(counts), words=torch.empty(sequences, side // 32, **whole),
    )  # fmt: skip
    bound, found = torch.empty(sequences, parts, 2, **wide), torch.empty(sequences, 2, **whole)
    rank_kernel[(sequences * tiles,)](
        means[0], means[1], counts, ranking.drops, ranking.peaks, bound, found,
        ranking.threshold, ranking.tally, ranking.rest, ranking.words,
        num_blocks, side, tiles, share,
        **order, BITS=bits, ROWS=rows, CHUNK=chunk, CHUNKS=chunks, WHOLE=parts == 1,
        GROUP=GROUP if 4 * GROUP * share <= rows * chunk else 1,
        HEAD_DIM=dim, BLOCK_D=width, COMPUTE=arithmetic(dtype)["COMPUTE"], PRECISION=score_precision(dtype),
        num_warps=max(1, rows * chunk // 2048), num_stages=3 if width <= 32 else 1, enable_fp_fusion=False,
    )  # fmt: skip
    if parts == 1:
        return ranking
    candidates = bound.new_empty(sequences, side * side, dtype=torch.uint32 if bits == 32 else torch.int64)
    size, lists = min(4096, side * side), dict(PARTS=triton.next_power_of_2(parts))
    narrow_kernel[(sequences * (side * side // size),)](
        ranking.drops, bound, found, candidates, side, side * side // size, parts,
        **order, **lists, SIZE=size, num_warps=4,
    )  # fmt: skip
    settle_kernel[(sequences,)](
        bound, found, candidates, ranking.threshold, ranking.words, side, parts, budget,
        **lists, BITS=bits, SIZE=CANDIDATES, num_warps=8,
    )  # fmt: skip
    tally_kernel[(sequences * (side // ROWS),)](
        ranking.drops, ranking.threshold, ranking.tally, ranking.rest, side, side // ROWS,
        **order, ROWS=ROWS, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return ranking
