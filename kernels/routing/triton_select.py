"""Routing's selection in Triton: the best tokens of each cluster, and the inverse.

    select    a threshold for each cluster by counting the keys that reach it, then its members, ascending; in long
              rows first one that a few times too many reach, which are listed, then the best of these
    offsets   how many clusters each token is in, and where its results lie in an order by token

The keys of `triton_score` are freed before the attention begins. Members are marked as one bit a cluster and token by
an integer atomic "or": its order is immaterial.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from statistics import NormalDist
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.tiles import ones_of
from kernels.routing.triton_score import score

WARP_KEYS = 1024
"""Keys that a warp holds in registers; of a row longer than a tile they are read again in every round."""
FEW_KEYS = 8192
"""Longest row that is left to one warp."""
MIN_CANDIDATES = 256


@triton.jit
def unsigned(key, BITS: tl.constexpr):
    """Keys as they are stored, as unsigned integers of at least 32 bits."""
    if BITS == 16:
        return key.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        return key.to(tl.uint32 if BITS == 32 else tl.uint64, bitcast=True)


@triton.jit
def load_keys(key_ptr, start, length, BLOCK_N: tl.constexpr, BITS: tl.constexpr):
    """Keys as unsigned integers of at least 32 bits, 0 behind the end, in rows of 16 bytes."""
    ROW: tl.constexpr = 128 // BITS
    offset = start + tl.arange(0, BLOCK_N // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    return unsigned(tl.load(key_ptr + offset, mask=offset < length, other=0), BITS)


@triton.jit
def count_reaching(
    keys, key_ptr, threshold, length, BITS: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """How many keys are at least `threshold`: of the tile `keys` where it is the whole row, else read again."""
    if RESIDENT:
        counts = tl.sum((keys >= threshold).to(tl.int32), axis=1)
    else:
        counts = tl.zeros((BLOCK_N * BITS // 128,), tl.int32)
        for start in range(0, length, BLOCK_N):
            counts += tl.sum((load_keys(key_ptr, start, length, BLOCK_N, BITS) >= threshold).to(tl.int32), axis=1)
    return tl.sum(counts, axis=0)


@triton.jit
def find_threshold(
    keys, key_ptr, probe, low, reached, high, beyond, length, window, most,
    BITS: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A threshold that at least `window` and at most `most` keys reach, else the largest that `window` reach.

    `low` is reached by `reached` keys, `high` by the fewer `beyond`. This bracket, which is returned, is narrowed,
    first at `probe`, then by interpolating log(count), which is nearly straight in the tail of a distribution, and in
    every third round it is halved.
    """
    one, rounds = tl.full((), 1, low.dtype), 0
    wanted = 0.5 * (tl.log2(tl.cast(window, tl.float32)) + tl.log2(tl.cast(most, tl.float32)))
    top, bottom = tl.log2(reached.to(tl.float32) + 0.5), tl.log2(beyond.to(tl.float32) + 0.5)
    while (reached > most) & (high - low > 1):
        probe = tl.maximum(tl.minimum(probe, high - one), low + one)
        count = count_reaching(keys, key_ptr, probe, length, BITS, RESIDENT, BLOCK_N)
        enough, level = count >= window, tl.log2(count.to(tl.float32) + 0.5)
        low, high = tl.where(enough, probe, low), tl.where(enough, high, probe)
        reached, beyond = tl.where(enough, count, reached), tl.where(enough, beyond, count)
        top, bottom = tl.where(enough, level, top), tl.where(enough, bottom, level)
        rounds += 1
        share = tl.where(rounds % 3 == 0, 0.5, tl.minimum((top - wanted) / (top - bottom), 0.99))
        probe = low + (share * (high - low).to(tl.float32)).to(low.dtype)
    return low, reached, high, beyond


@triton.jit
def bits_of(chosen, BITS: tl.constexpr):
    """Row by row the chosen columns as bits of one word."""
    bit = tl.full((128 // BITS,), 1, tl.int32) << tl.arange(0, 128 // BITS)
    return tl.sum(tl.where(chosen, bit[None, :], 0), axis=1)


@triton.jit
def lowest_bits(word, count, BITS: tl.constexpr):
    """The lowest `count` ones of each word."""
    kept = tl.zeros_like(word)
    for rank in tl.static_range(128 // BITS):
        kept |= tl.where(rank < count, word & -word, 0)
        word &= word - 1
    return kept


@triton.jit
def write_members(
    keys, key_ptr, token_ptr, to_ptr, word_ptr, mark, lowest_visible, threshold, reached, room, length, most,
    MARK: tl.constexpr, LISTED: tl.constexpr, BITS: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the ascending positions of the keys from `threshold` on; returns how many.

    LISTED: the position of key i is `token_ptr[i]`, else i. Where more than `most` keys reach the threshold, only the
    first `room` that equal it count. MARK: those from `lowest_visible` on, the others leave their slots empty.
    """
    ROW: tl.constexpr = 128 // BITS
    filled, row = 0, tl.arange(0, BLOCK_N // ROW) * ROW
    for start in range(0, 1 if RESIDENT else length, BLOCK_N):
        if not RESIDENT:
            keys = load_keys(key_ptr, start, length, BLOCK_N, BITS)
        word = bits_of(keys >= threshold, BITS)
        if reached > most:
            tied = bits_of(keys == threshold, BITS)
            count = ones_of(tied)
            ends = tl.cumsum(count, axis=0)
            word ^= tied ^ lowest_bits(tied, room - (ends - count), BITS)
            room -= tl.max(ends, axis=0)
        count = ones_of(word)
        ends = tl.cumsum(count, axis=0)
        slot = to_ptr + (filled + ends - count)
        for rank in range(0, tl.max(count, axis=0)):  # few columns of a row are chosen
            token = start + row + ones_of((word & -word) - 1)
            if LISTED:
                token = tl.load(token_ptr + token, mask=word != 0, other=0)
            if MARK:
                visible = token >= lowest_visible
                tl.atomic_or(word_ptr + token, mark, mask=(word != 0) & visible, sem="relaxed")
                token = tl.where(visible, token, length)
            tl.store(slot + rank, token, mask=word != 0)
            word &= word - 1
        filled += tl.max(ends, axis=0)
    return filled


@triton.jit
def select_kernel(
    key_ptr, index_ptr, word_ptr, candidate_ptr,  # (2, B·H, K, N), (2, B·H, K, w), (2, B·H, W, N), (…, CANDIDATES)
    guess, first_guess, length, window, heads,
    K: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, BITS: tl.constexpr, RESIDENT: tl.constexpr,
    CANDIDATES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Ascending positions of the `window` largest keys of one cluster, N in slots left empty, and their marks.

    Ties go to the lower position. Where CANDIDATES is not 0, at most that many are listed first, and then the best of
    them. Causal: one program takes the keys, then the queries, of which one that would see no key of the cluster does
    not count as a member.
    """
    ROW: tl.constexpr = 128 // BITS
    WORDS: tl.constexpr = (K + 31) // 32
    UNSIGNED = tl.uint64 if BITS == 64 else tl.uint32
    head, c = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    one, mark, lowest = tl.full((), 1, UNSIGNED), tl.full((), 1, tl.int32) << (c % 32), 0
    for turn in tl.static_range(2 if CAUSAL else 1):
        side = (1 - turn if CAUSAL else tl.program_id(1)) * heads + head
        keys_of, members_of = key_ptr + (side * K + c) * length, index_ptr + (side * K + c) * window
        words_of = word_ptr + (side * WORDS + c // 32) * length
        keys = load_keys(keys_of, 0, length, BLOCK_N, BITS)
        low, reached, beyond = one, tl.full((), 0, tl.int32) + length, tl.full((), 0, tl.int32)
        high = (one << 16) if BITS == 16 else ~tl.full((), 0, UNSIGNED)
        middle = one * guess if BITS == 16 else one << (BITS - 1)
        if HAS_MASK:  # with few real tokens all of them are chosen
            reached = tl.maximum(count_reaching(keys, keys_of, one, length, BITS, RESIDENT, BLOCK_N), window)
        if CANDIDATES:
            first = one * first_guess if BITS == 16 else middle
            low, reached, high, beyond = find_threshold(
                keys, keys_of, first, low, reached, high, beyond, length, window, CANDIDATES, BITS, RESIDENT, BLOCK_N
            )
            list_ptr = candidate_ptr + (side * K + c) * CANDIDATES
            listed = write_members(
                keys, keys_of, list_ptr, list_ptr, words_of, mark, 0, low, reached, window - beyond, length, CANDIDATES,
                False, False, BITS, RESIDENT, BLOCK_N,
            )  # fmt: skip
            tl.debug_barrier()  # other threads wrote what is read below
            place_in_list = tl.arange(0, CANDIDATES // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
            token = tl.load(list_ptr + place_in_list, mask=place_in_list < listed, other=0)
            keys = unsigned(tl.load(keys_of + token, mask=place_in_list < listed, other=0), BITS)
            low, reached, high, beyond = find_threshold(
                keys, keys_of, middle, low, tl.maximum(listed, window), high, beyond, length, window, window,
                BITS, True, CANDIDATES,
            )  # fmt: skip
            filled = write_members(
                keys, keys_of, list_ptr, members_of, words_of, mark, lowest, low, reached, window - beyond, length,
                window, True, True, BITS, True, CANDIDATES,
            )  # fmt: skip
        else:
            low, reached, high, beyond = find_threshold(
                keys, keys_of, middle, low, reached, high, beyond, length, window, window, BITS, RESIDENT, BLOCK_N
            )
            filled = write_members(
                keys, keys_of, members_of, members_of, words_of, mark, lowest, low, reached, window - beyond, length,
                window, True, False, BITS, RESIDENT, BLOCK_N,
            )  # fmt: skip
        if HAS_MASK:
            for start in range(0, window, BLOCK_W):
                slot = start + tl.arange(0, BLOCK_W)
                empty = (slot >= filled) & (slot < window)
                tl.store(members_of + slot, tl.zeros((BLOCK_W,), tl.int32) + length, mask=empty)
        if CAUSAL and turn == 0:
            tl.debug_barrier()  # another thread wrote it
            lowest = tl.load(members_of)


@triton.jit
def offsets_kernel(word_ptr, offset_ptr, length, WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """offset_n = Σ_{m<n} (clusters of token m) for one side of one head, (N + 1,)."""
    head = tl.program_id(0).to(tl.int64)
    word_ptr += head * WORDS * length
    offset_ptr += head * (length + 1)
    before = 0
    for start in range(0, length, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        count = tl.zeros((BLOCK_N,), tl.int32)
        for word in tl.static_range(WORDS):
            count += ones_of(tl.load(word_ptr + word * length + token, mask=token < length, other=0))
        tl.store(offset_ptr + 1 + token, before + tl.cumsum(count, axis=0), mask=token < length)
        before += tl.sum(count, axis=0)
    tl.store(offset_ptr, 0)


# ------------------------------------------------------------------------------------------------------------ launches


class Selection(NamedTuple):
    """Who is in which cluster, and what trains the centroids; side 0 is of queries, side 1 of keys."""

    members: Tensor
    """(2, B·H, K, w): ascending positions of the members, N in empty slots."""
    words: Tensor
    """(2, B·H, W, N): bit c % 32 of word c // 32 says that the token is in cluster c."""
    offsets: Tensor
    """(2, B·H, N + 1): where the results of a token begin, in an order by token, then by cluster."""
    best: Tensor
    """(2, B·H, N): the nearest centroid."""
    centroids: Tensor
    """A copy, since the module moves its own before the backward pass reads them."""
    pull: Tensor
    """(): 2 / (terms of the commitment loss)."""
    commitment: Tensor
    counts: Tensor
    sums: Tensor


def select(q: Tensor, k: Tensor, key_mask: Tensor | None, centroids: Tensor, window: int, causal: bool) -> Selection:
    """Selection of the heads that have centroids, (H, K, D) contiguous; see `kernels.routing.api` for the rest."""
    batch, _, length, dim = q.shape
    heads, clusters, _ = centroids.shape
    rows, window, bits = batch * heads, min(window, length), 8 * q.element_size()
    whole = dict(dtype=torch.int32, device=q.device)
    keys, marks, trained = score(q, k, key_mask, centroids)

    index = torch.empty(2, rows, clusters, window, **whole)
    block_n, candidates, select_warps = select_sizes(length, window)
    listed = torch.empty(2, rows, clusters, candidates, **whole)
    aim = min(length, round((window * max(window, candidates)) ** 0.5))
    select_kernel[(rows * clusters, 1 if causal else 2)](
        keys, index, marks, listed, guess(window, length, dim), guess(aim, length, dim), length, window, rows,
        K=clusters, CAUSAL=causal, HAS_MASK=key_mask is not None, BITS=bits, RESIDENT=length <= block_n,
        CANDIDATES=candidates, BLOCK_N=block_n, BLOCK_W=128, num_warps=select_warps,
    )  # fmt: skip
    offsets = torch.empty(2, rows, length + 1, **whole)
    offsets_kernel[(2 * rows,)](
        marks, offsets, length, WORDS=marks.shape[2], BLOCK_N=min(8192, triton.next_power_of_2(length)),
        num_warps=8 if length <= 4096 else 16,
    )  # fmt: skip
    return Selection(index, marks, offsets, *trained)


def guess(tokens: int, length: int, dim: int) -> int:
    """The 16-bit key that `tokens` of `length` would reach if cosines were normal with variance 1 / D."""
    level = NormalDist().inv_cdf(1 - tokens / (length + 1)) * dim**-0.5
    return 32768 + round(32767 * min(max(level, -0.99), 0.99))


def select_sizes(length: int, window: int) -> tuple[int, int, int]:
    """Keys of a tile, candidates that are listed, 0 to do without, and warps, each of 1024 keys.

    One warp needs no barriers, several share the list and its rounds. A list pays where it is shorter than a tile.
    """
    candidates = max(MIN_CANDIDATES, 2 * triton.next_power_of_2(window))
    warps = 4 if length > FEW_KEYS or candidates > WARP_KEYS else 1
    block_n = min(warps * WARP_KEYS, max(16, triton.next_power_of_2(length)))
    return block_n, candidates if length > block_n >= candidates else 0, warps
