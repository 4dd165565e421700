"""Routing's selection in Triton: scores against the centroids, the best tokens of each cluster, and the inverse.

    score     s_ci = μ_c · x̂_i as keys that sort as unsigned integers, (K, N); argmax_c, commitment, counts and sums
    merge     the partial sums of `score`, in a fixed order
    select    a threshold for each cluster by counting the keys that reach it, then its members, ascending; in long
              rows first one that a few times too many reach, which are listed, then the best of these
    offsets   how many clusters each token is in, and where its results lie in an order by token

Half precisions have keys of 16 bits, steps of 2⁻¹⁵ √D |μ_c|, a tenth of what rounding q and k costs; float32 keys are
exact. Keys are the only array that grows with clusters × tokens, 4 bytes a cluster and token in bf16, and are freed
before the attention begins. Members are marked as one bit a cluster and token by an integer atomic "or": its order is
immaterial.
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

from kernels.common.launch import arithmetic, block_dim, mask_arguments, split, state_dtype, strides
from kernels.common.tiles import gather_rows, load_rows, place, real_rows
from kernels.routing import centroids as means

EPS, COUNT_EPS = tl.constexpr(means.LAYER_NORM_EPS), tl.constexpr(means.COUNT_EPS)
MERGE_ROWS, MERGE_SLOTS = 2, 64
WARP_KEYS = 1024
"""Keys that a warp holds in registers; of a row longer than a tile they are read again in every round."""
FEW_KEYS = 8192
"""Longest row that is left to one warp."""
MIN_CANDIDATES = 256


@triton.jit
def normalise(x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """x̂ = (x − mean) / √(variance + ε) of each row, and the second factor; zero in columns of padding, as x is."""
    centred = x - (tl.sum(x, axis=1) / HEAD_DIM)[:, None]
    if HEAD_DIM != BLOCK_D:
        centred = tl.where((tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], centred, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / HEAD_DIM + EPS)
    return centred * scale[:, None], scale


@triton.jit
def halves(x):
    """x as the sum of two float16, exact to 2⁻²² where |x| is about one."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def score_product(a, b, b_high, b_low, COMPUTE: tl.constexpr, SPLIT: tl.constexpr):
    """a @ bᵀ as exact as in float32; SPLIT: on the tensor cores, as three products of halves."""
    if SPLIT:
        a_high, a_low = halves(a)
        b_high, b_low = tl.trans(b_high), tl.trans(b_low)
        return tl.dot(a_high, b_high, tl.dot(a_low, b_high, tl.dot(a_high, b_low)))
    else:
        return tl.dot(a, tl.trans(b), out_dtype=COMPUTE, input_precision="ieee")


@triton.jit
def directions(
    centroid_ptr, first, K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """μ / |μ| of one block of clusters, with its halves, and |μ|; zero for a zero centroid."""
    cluster, offset_d = first + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    known = (cluster < K)[:, None] & (offset_d < HEAD_DIM)[None, :]
    rows = centroid_ptr + cluster[:, None] * HEAD_DIM + offset_d[None, :]
    centroid = tl.load(rows, mask=known, other=0.0).to(COMPUTE)
    norm = tl.sqrt(tl.sum(centroid * centroid, axis=1))
    direction = centroid * tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)[:, None]
    high, low = halves(direction)
    return direction, high, low, norm


@triton.jit
def sortable(cosine, score, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    """Keys that sort as unsigned integers, at least 1, from √D cos(μ, x) or from μ · x̂.

    16 bits: 32768 + 32767 cos, rounded by adding 2²³, which leaves an integer in the low bits of a float32. Else the
    bits of the score, those of negative ones inverted.
    """
    if BITS == 16:
        level = cosine * (32767.0 * HEAD_DIM**-0.5) + (32768.0 + 8388608.0)
        return level.to(tl.int32, bitcast=True).to(tl.int16)
    else:
        INTEGER = tl.int32 if BITS == 32 else tl.int64
        bits = (score + 0.0).to(INTEGER, bitcast=True)  # −0 + 0 = 0
        lowest = tl.full((), 1, INTEGER) << (BITS - 1)
        return tl.where(bits < 0, ~bits, bits | lowest)


@triton.jit
def score_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    mask_ptr, mask_b, mask_n,
    centroid_ptr,  # (H, K, D)
    key_ptr, best_ptr, word_ptr,  # (2, B·H, K, N), (2, B·H, N), (2, B·H, W, N)
    count_ptr, sum_ptr, loss_ptr, token_ptr,  # slots (H, 2 · B · splits, …): (K',), (K', D'), (blocks,), (blocks,)
    length, num_batches, num_heads, splits, chunk,
    K: tl.constexpr, BITS: tl.constexpr, HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Keys of one block of clusters, and its statistics, over one part of the queries (side 0) or keys (side 1)."""
    b, h, part = place(tl.program_id(0), num_heads, splits)
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    side, wide_h = tl.program_id(1), h.to(tl.int64)
    mine = 0 if BLOCKS == 1 else tl.program_id(2)
    if side == 0:
        x_ptr, x_n = q_ptr + b * q_b + wide_h * q_h, q_n
    else:
        x_ptr, x_n = k_ptr + b * k_b + wide_h * k_h, k_n
    mask_ptr += b * mask_b
    centroid_ptr += h * K * HEAD_DIM
    head = (side * num_batches + b) * num_heads + h
    WORDS: tl.constexpr = (K + 31) // 32
    OWN_WORDS: tl.constexpr = (BLOCK_K + 31) // 32
    key_ptr += head * K * length
    best_ptr += head * length
    word_ptr += head * WORDS * length
    offset_n, offset_d, offset_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    count, counts = tl.zeros((BLOCK_K,), COMPUTE), tl.zeros((BLOCK_K, 16), COMPUTE)
    total = tl.zeros((BLOCK_K, BLOCK_D), COMPUTE)
    loss, tokens = tl.zeros((BLOCK_N,), COMPUTE), tl.zeros((BLOCK_N,), COMPUTE)
    if BLOCKS == 1:
        direction, high, low, norm = directions(centroid_ptr, 0, K, HEAD_DIM, BLOCK_K, BLOCK_D, COMPUTE)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        inside = start + offset_n < length
        real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        x = load_rows(x_ptr, x_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        x_hat, _ = normalise(x.to(COMPUTE), HEAD_DIM, BLOCK_D)
        best_score, best = tl.full((BLOCK_N,), -float("inf"), COMPUTE), tl.zeros((BLOCK_N,), tl.int32)
        for block in tl.static_range(BLOCKS):
            if BLOCKS > 1:
                direction, high, low, norm = directions(
                    centroid_ptr, block * BLOCK_K, K, HEAD_DIM, BLOCK_K, BLOCK_D, COMPUTE
                )
            cluster = block * BLOCK_K + offset_k
            # The scores of a token lie in four threads, which find the best with few exchanges.
            cosine = score_product(x_hat, direction, high, low, COMPUTE, SPLIT)  # (BLOCK_N, BLOCK_K), × √D
            score = cosine * norm[None, :]
            if block == mine:
                key = sortable(cosine, score, HEAD_DIM, BITS)
                if HAS_MASK:
                    key = tl.where(real[:, None], key, 0)
                position = key_ptr + cluster.to(tl.int64)[:, None] * length + (start + offset_n)[None, :]
                tl.store(position, tl.trans(key), mask=(cluster < K)[:, None] & inside[None, :])
            if K % BLOCK_K != 0:
                score = tl.where((cluster < K)[None, :], score, -float("inf"))
            here = tl.max(score, axis=1)
            first = tl.min(tl.where(score == here[:, None], cluster[None, :], K), axis=1)
            best = tl.where(here > best_score, first, best)
            best_score = tl.maximum(best_score, here)

        if mine == 0:
            tl.store(best_ptr + start + offset_n, best, mask=inside)
        for word in tl.static_range(OWN_WORDS):
            row = mine * OWN_WORDS + word
            if row < WORDS:
                tl.store(word_ptr + row * length + start + offset_n, tl.zeros_like(best), mask=inside)
        best = tl.where(real, best - mine * BLOCK_K, -1)  # within the block, if it is there
        own = (best >= 0) & (best < BLOCK_K)
        nearest = gather_rows(centroid_ptr, HEAD_DIM, mine * BLOCK_K + best, own, HEAD_DIM, BLOCK_D).to(COMPUTE)
        error = tl.where(own[:, None], x_hat - nearest, 0.0)
        loss += tl.sum(error * error, axis=1)
        tokens += tl.where(real, 1.0, 0.0).to(COMPUTE)
        chosen = best[None, :] == offset_k[:, None]
        if SPLIT:
            x_high, x_low = halves(x_hat)
            one_hot = chosen.to(tl.float16)
            total = tl.dot(one_hot, x_high, tl.dot(one_hot, x_low, total))
            counts = tl.dot(one_hot, tl.full((BLOCK_N, 16), 1.0, tl.float16), counts)  # the same in all columns
        else:
            count += tl.sum(chosen.to(COMPUTE), axis=1)
            total += tl.dot(chosen.to(COMPUTE), x_hat, out_dtype=COMPUTE, input_precision="ieee")

    slot = (wide_h * 2 * num_batches + side * num_batches + b) * splits + part
    rows = (slot * BLOCKS + mine) * BLOCK_K + offset_k
    tl.store(count_ptr + rows, tl.max(counts, axis=1) if SPLIT else count)
    tl.store(sum_ptr + rows[:, None] * BLOCK_D + offset_d[None, :], total)
    tl.store(loss_ptr + slot * BLOCKS + mine, tl.sum(loss))
    tl.store(token_ptr + slot * BLOCKS + mine, tl.sum(tokens))


@triton.jit
def merge_kernel(
    count_ptr, sum_ptr, loss_ptr, token_ptr, centroid_ptr,
    counts_ptr, sums_ptr, copy_ptr, commitment_ptr, pull_ptr,  # (H, K), (H, K, D), (H, K, D), (), ()
    slots, partials, num_heads,
    K: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Counts and sums of ROWS clusters of one head, and a copy of their centroids, which the caller may move.

    Program 0 also gives the commitment loss and 2 / (its terms).
    """
    ALL: tl.constexpr = BLOCKS * BLOCK_K
    h, first = (tl.program_id(0) // (ALL // ROWS)).to(tl.int64), tl.program_id(0) % (ALL // ROWS) * ROWS
    offset_s, offset_r, offset_x = tl.arange(0, SLOTS), tl.arange(0, ROWS), tl.arange(0, ROWS * BLOCK_D)
    count, total = tl.zeros((SLOTS, ROWS), COMPUTE), tl.zeros((SLOTS, ROWS * BLOCK_D), COMPUTE)
    for start in range(0, slots, SLOTS):
        row = ((h * slots + start + offset_s) * ALL + first)[:, None]
        inside = (start + offset_s < slots)[:, None]
        count += tl.load(count_ptr + row + offset_r[None, :], mask=inside, other=0.0)
        total += tl.load(sum_ptr + row * BLOCK_D + offset_x[None, :], mask=inside, other=0.0)
    cluster = first + offset_r
    tl.store(counts_ptr + h * K + cluster, tl.sum(count, axis=0), mask=cluster < K)
    row, column = first + offset_x // BLOCK_D, offset_x % BLOCK_D
    position, exists = (h * K + row) * HEAD_DIM + column, (row < K) & (column < HEAD_DIM)
    tl.store(sums_ptr + position, tl.sum(total, axis=0), mask=exists)
    tl.store(copy_ptr + position, tl.load(centroid_ptr + position, mask=exists), mask=exists)
    if tl.program_id(0) == 0:
        FLAT: tl.constexpr = SLOTS * ROWS * BLOCK_D
        offset = tl.arange(0, FLAT)
        loss, tokens = tl.zeros((FLAT,), COMPUTE), tl.zeros((FLAT,), COMPUTE)
        for start in range(0, partials, FLAT):
            loss += tl.load(loss_ptr + start + offset, mask=start + offset < partials, other=0.0)
            tokens += tl.load(token_ptr + start + offset, mask=start + offset < partials, other=0.0)
        # Every head, both sides and every block of clusters counted the same real tokens.
        terms = tl.maximum(tl.sum(tokens) / (2 * num_heads * BLOCKS), 1.0) * num_heads * HEAD_DIM
        tl.store(commitment_ptr, tl.sum(loss) / terms)
        tl.store(pull_ptr, 2.0 / terms)


@triton.jit
def move_kernel(
    ema_count_ptr, ema_sum_ptr, centroid_ptr, count_ptr, sum_ptr,  # (H, K), (H, K, D), …
    K: tl.constexpr, RATE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Running counts and sums of one head, then its centroids, in place: `kernels.routing.centroids.move`."""
    h, offset_d = tl.program_id(0), tl.arange(0, BLOCK_D)
    total = 0.0
    for first in range(0, K, BLOCK_K):
        cluster = first + tl.arange(0, BLOCK_K)
        count = tl.load(ema_count_ptr + h * K + cluster, mask=cluster < K, other=0.0)
        total += tl.sum(count + RATE * (tl.load(count_ptr + h * K + cluster, mask=cluster < K, other=0.0) - count))
    tl.debug_barrier()  # all are read before any is written
    for first in range(0, K, BLOCK_K):
        cluster = h * K + first + tl.arange(0, BLOCK_K)
        exists = first + tl.arange(0, BLOCK_K) < K
        count = tl.load(ema_count_ptr + cluster, mask=exists, other=0.0)
        count += RATE * (tl.load(count_ptr + cluster, mask=exists, other=0.0) - count)
        tl.store(ema_count_ptr + cluster, count, mask=exists)
        weight = tl.where(total > 0, (count + COUNT_EPS) / (total + K * COUNT_EPS) * total, 1.0)
        row, exists = cluster[:, None] * HEAD_DIM + offset_d[None, :], exists[:, None] & (offset_d < HEAD_DIM)[None, :]
        mean = tl.load(ema_sum_ptr + row, mask=exists, other=0.0)
        mean += RATE * (tl.load(sum_ptr + row, mask=exists, other=0.0) - mean)
        tl.store(ema_sum_ptr + row, mean, mask=exists)
        tl.store(centroid_ptr + row, mean / weight[:, None], mask=exists)


@triton.jit
def ones_of(word):
    """Bits set in each 32-bit word."""
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


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
    rows, words, window = batch * heads, triton.cdiv(clusters, 32), min(window, length)
    width, wide = block_dim(dim), state_dtype(q.dtype)
    block_k = min(128, max(16, triton.next_power_of_2(clusters)))
    blocks = triton.cdiv(clusters, block_k)
    bits = 8 * q.element_size()
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    options = dict(dtype=wide, device=q.device)
    whole = dict(dtype=torch.int32, device=q.device)

    keys = torch.empty(2, rows, clusters, length, dtype=integer, device=q.device)
    best, word = torch.empty(2, rows, length, **whole), torch.empty(2, rows, words, length, **whole)
    tile, warps, stages = score_tile(block_k, width)
    splits, chunk = split(length, tile, 2 * rows)
    slots = 2 * batch * splits
    count = torch.empty(heads, slots, blocks * block_k, **options)
    total = torch.empty(heads, slots, blocks * block_k, width, **options)
    loss, tokens = (torch.empty(heads, slots, blocks, **options) for _ in range(2))
    compute = arithmetic(q.dtype)["COMPUTE"]
    sizes = dict(K=clusters, HEAD_DIM=dim, BLOCK_D=width, BLOCK_K=block_k, COMPUTE=compute)
    score_kernel[(rows * splits, 2, blocks)](
        q, *strides(q), k, *strides(k), *mask_arguments(key_mask, q), centroids, keys, best, word,
        count, total, loss, tokens, length, batch, heads, splits, chunk,
        BITS=bits, HAS_MASK=key_mask is not None, BLOCK_N=tile, SPLIT=bits == 16, **sizes,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    counts = torch.empty(heads, clusters, **options)
    sums, copy = (torch.empty(heads, clusters, dim, **options) for _ in range(2))
    commitment, pull = torch.empty((), **options), torch.empty((), **options)
    merge_kernel[(heads * blocks * block_k // MERGE_ROWS,)](
        count, total, loss, tokens, centroids, counts, sums, copy, commitment, pull, slots, loss.numel(), heads,
        BLOCKS=blocks, ROWS=MERGE_ROWS, SLOTS=MERGE_SLOTS, num_warps=4, **sizes,
    )  # fmt: skip

    index = torch.empty(2, rows, clusters, window, **whole)
    block_n, candidates, select_warps = select_sizes(length, window)
    listed = torch.empty(2, rows, clusters, candidates, **whole)
    aim = min(length, round((window * max(window, candidates)) ** 0.5))
    select_kernel[(rows * clusters, 1 if causal else 2)](
        keys, index, word, listed, guess(window, length, dim), guess(aim, length, dim), length, window, rows,
        K=clusters, CAUSAL=causal, HAS_MASK=key_mask is not None, BITS=bits, RESIDENT=length <= block_n,
        CANDIDATES=candidates, BLOCK_N=block_n, BLOCK_W=128, num_warps=select_warps,
    )  # fmt: skip
    offsets = torch.empty(2, rows, length + 1, **whole)
    offsets_kernel[(2 * rows,)](
        word,
        offsets,
        length,
        WORDS=words,
        BLOCK_N=min(8192, triton.next_power_of_2(length)),
        num_warps=8 if length <= 4096 else 16,
    )
    return Selection(index, word, offsets, best, copy, pull, commitment, counts, sums)


def move(ema_counts: Tensor, ema_sums: Tensor, centroids: Tensor, counts: Tensor, sums: Tensor, decay: float) -> None:
    """`kernels.routing.centroids.move` in one launch; all contiguous and of one dtype."""
    heads, clusters, dim = centroids.shape
    width = block_dim(dim)
    move_kernel[(heads,)](
        ema_counts, ema_sums, centroids, counts, sums,
        K=clusters, RATE=1 - decay, HEAD_DIM=dim, BLOCK_K=min(4096 // width, triton.next_power_of_2(clusters)),
        BLOCK_D=width, num_warps=8,
    )  # fmt: skip


def score_tile(block_k: int, width: int) -> tuple[int, int, int]:
    """Tokens of a tile of scores, warps and stages: two programs of 4 warps hide more than one of 8."""
    return 128 if block_k <= 32 and width <= 32 else 64, 4 if block_k * width <= 4096 else 8, 1


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
