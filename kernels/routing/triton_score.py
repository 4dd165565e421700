"""Routing's scores in Triton, and what they give for the centroids.

    score     s_ci = μ_c · x̂_i as keys that sort as unsigned integers, (K, N); argmax_c, commitment, counts and sums
    merge     the partial sums of `score`, in a fixed order
    move      the running means of the module, and its centroids

Half precisions have keys of 16 bits, steps of 2⁻¹⁵ √D |μ_c|, a tenth of what rounding q and k costs; float32 keys are
exact. Keys are the only array that grows with clusters × tokens, 4 bytes a cluster and token in bf16.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import COUNTS, arithmetic, block_dim, mask_arguments, split, state_dtype, strides
from kernels.common.tiles import gather_rows, load_rows, place, real_rows
from kernels.routing import centroids as means

EPS, COUNT_EPS = tl.constexpr(means.LAYER_NORM_EPS), tl.constexpr(means.COUNT_EPS)
MERGE_ROWS, MERGE_SLOTS = 2, 64


@triton.jit
def normalise(x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """x̂ = (x − mean) / √(variance + ε) of each row, and the second factor; zero in columns of padding, as x is."""
    centred = x - (tl.sum(x, axis=1) / HEAD_DIM)[:, None]
    if HEAD_DIM != BLOCK_D:
        centred = tl.where((tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], centred, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / HEAD_DIM + EPS)
    return centred * scale[:, None], scale


@triton.jit
def rows_of_side(side, b, h, q_ptr, q_b, q_h, q_n, k_ptr, k_b, k_h, k_n):
    """A head's first row of the queries (side 0) or of the keys (side 1), and the stride of rows."""
    if side == 0:
        x_ptr, x_n = q_ptr + b * q_b + h * q_h, q_n
    else:
        x_ptr, x_n = k_ptr + b * k_b + h * k_h, k_n
    return x_ptr, x_n


@triton.jit
def high_and_low(x):
    """x as the sum of two float16, exact to 2⁻²² where |x| is about one."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def score_product(a, b, b_high, b_low, COMPUTE: tl.constexpr, SPLIT: tl.constexpr):
    """a @ bᵀ as exact as in float32; SPLIT: on the tensor cores, as three products of float16."""
    if SPLIT:
        a_high, a_low = high_and_low(a)
        b_high, b_low = tl.trans(b_high), tl.trans(b_low)
        return tl.dot(a_high, b_high, tl.dot(a_low, b_high, tl.dot(a_high, b_low)))
    else:
        return tl.dot(a, tl.trans(b), out_dtype=COMPUTE, input_precision="ieee")


@triton.jit
def directions(
    centroid_ptr, first, K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """μ / |μ| of one block of clusters, with its two float16, and |μ|; zero for a zero centroid."""
    cluster, offset_d = first + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    known = (cluster < K)[:, None] & (offset_d < HEAD_DIM)[None, :]
    rows = centroid_ptr + cluster[:, None] * HEAD_DIM + offset_d[None, :]
    centroid = tl.load(rows, mask=known, other=0.0).to(COMPUTE)
    norm = tl.sqrt(tl.sum(centroid * centroid, axis=1))
    direction = centroid * tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)[:, None]
    high, low = high_and_low(direction)
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


@triton.jit(do_not_specialize_on_alignment=COUNTS)
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
    x_ptr, x_n = rows_of_side(side, b, wide_h, q_ptr, q_b, q_h, q_n, k_ptr, k_b, k_h, k_n)
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
            x_high, x_low = high_and_low(x_hat)
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


# ------------------------------------------------------------------------------------------------------------ launches


def score(
    q: Tensor, k: Tensor, key_mask: Tensor | None, centroids: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Scores of the heads that have centroids, (H, K, D) contiguous.

    Returns keys (2, B·H, K, N), 0 for padding, zeros for marks (2, B·H, W, N), and what trains the centroids: `best`
    and the further fields of `triton_select.Selection`.
    """
    batch, _, length, dim = q.shape
    heads, clusters, _ = centroids.shape
    rows, words = batch * heads, triton.cdiv(clusters, 32)
    width, wide = block_dim(dim), state_dtype(q.dtype)
    block_k = min(128, max(16, triton.next_power_of_2(clusters)))
    blocks = triton.cdiv(clusters, block_k)
    bits = 8 * q.element_size()
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    options, whole = dict(dtype=wide, device=q.device), dict(dtype=torch.int32, device=q.device)

    keys = torch.empty(2, rows, clusters, length, dtype=integer, device=q.device)
    best, marks = torch.empty(2, rows, length, **whole), torch.empty(2, rows, words, length, **whole)
    tile, warps = score_tile(block_k, width)
    splits, chunk = split(length, tile, 2 * rows)
    slots = 2 * batch * splits
    count = torch.empty(heads, slots, blocks * block_k, **options)
    total = torch.empty(heads, slots, blocks * block_k, width, **options)
    loss, tokens = (torch.empty(heads, slots, blocks, **options) for _ in range(2))
    compute = arithmetic(q.dtype)["COMPUTE"]
    sizes = dict(K=clusters, HEAD_DIM=dim, BLOCK_D=width, BLOCK_K=block_k, COMPUTE=compute)
    score_kernel[(rows * splits, 2, blocks)](
        q, *strides(q), k, *strides(k), *mask_arguments(key_mask, q), centroids, keys, best, marks,
        count, total, loss, tokens, length, batch, heads, splits, chunk,
        BITS=bits, HAS_MASK=key_mask is not None, BLOCK_N=tile, SPLIT=bits == 16, **sizes,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    counts = torch.empty(heads, clusters, **options)
    sums, copy = (torch.empty(heads, clusters, dim, **options) for _ in range(2))
    commitment, pull = torch.empty((), **options), torch.empty((), **options)
    merge_kernel[(heads * blocks * block_k // MERGE_ROWS,)](
        count, total, loss, tokens, centroids, counts, sums, copy, commitment, pull, slots, loss.numel(), heads,
        BLOCKS=blocks, ROWS=MERGE_ROWS, SLOTS=MERGE_SLOTS, num_warps=4, **sizes,
    )  # fmt: skip
    return keys, marks, (best, copy, pull, commitment, counts, sums)


def move(ema_counts: Tensor, ema_sums: Tensor, centroids: Tensor, counts: Tensor, sums: Tensor, decay: float) -> None:
    """`kernels.routing.centroids.move` in one launch; all contiguous and of one dtype."""
    heads, clusters, dim = centroids.shape
    width = block_dim(dim)
    move_kernel[(heads,)](
        ema_counts, ema_sums, centroids, counts, sums,
        K=clusters, RATE=1 - decay, HEAD_DIM=dim, BLOCK_K=min(4096 // width, triton.next_power_of_2(clusters)),
        BLOCK_D=width, num_warps=8,
    )  # fmt: skip


def score_tile(block_k: int, width: int) -> tuple[int, int]:
    """Tokens of a tile of scores, and warps: two programs of 4 warps hide more than one of 8."""
    return 128 if block_k <= 32 and width <= 32 else 64, 4 if block_k * width <= 4096 else 8
