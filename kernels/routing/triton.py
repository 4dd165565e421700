"""Routing attention in Triton: attention inside clusters, and its mean over the clusters of a query.

    o_ci = softmax_j(q̂_i · k̂_j / √D) v_j, j in K_c       for i in Q_c
    out_i = Σ_c o_ci / (clusters of i)

One program takes one cluster: it gathers the rows of its members, and normalises them in registers. A member of this
cluster only is finished on the spot, forward and backward (`triton_backward`); the results of the others go to a row of
their own in an order by token, which a second pass sums, cluster by cluster: no atomics on floats, and every bit
repeats.

Traffic, in touches of one (B, H_r, N, D) tensor, with a share m of the slots in tokens of several clusters: forward
2 (scores) + 4 + 2 m, backward 7 + 6 m. A window above `TILE` members is read tile by tile, with the online softmax.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import COUNTS, arithmetic, block_dim, split, state_dtype, strides
from kernels.common.tiles import LOG2E, NEVER, gather_rows, ones_of, place, product, scatter_rows
from kernels.routing.triton_score import normalise
from kernels.routing.triton_select import Selection

COMBINE_TILE = 8192
"""Elements of a tile of 4 warps."""

# By padded head dimension and bytes of an element: the most members of a tile.
TILE = {
    2: {16: 128, 32: 128, 64: 128, 128: 64},
    4: {16: 64, 32: 64, 64: 64, 128: 32},
    8: dict.fromkeys((16, 32, 64, 128), 32),
}


@triton.jit
def members(index_ptr, start, window, length, BLOCK_W: tl.constexpr):
    """Positions of a tile of members, and which slots hold one."""
    slot = start + tl.arange(0, BLOCK_W)
    token = tl.load(index_ptr + slot, mask=slot < window, other=length)
    return token, token < length


@triton.jit
def key_tile(
    k_ptr, k_n, v_ptr, v_n, index_ptr, start, window, length, HEAD_DIM: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile of key members: positions, which slots hold one, k̂ and v."""
    key, keep = members(index_ptr, start, window, length, BLOCK_W)
    k = gather_rows(k_ptr, k_n, key, keep, HEAD_DIM, BLOCK_D).to(COMPUTE)
    k_hat, _ = normalise(k, HEAD_DIM, BLOCK_D)
    return key, keep, k_hat, gather_rows(v_ptr, v_n, key, keep, HEAD_DIM, BLOCK_D)


@triton.jit
def place_in_cluster(pid, tiles, num_heads, K: tl.constexpr):
    """Tile and cluster of a program; row of heads, its sequence and its head (64 bits)."""
    head = (pid // (tiles * K)).to(tl.int64)
    return pid % tiles, pid // tiles % K, head, head // num_heads, head % num_heads


@triton.jit
def clusters_of(offset_ptr, token, keep):
    """Where the results of each token begin in the order by token, and of how many clusters it is."""
    first = tl.load(offset_ptr + token, mask=keep, other=0)
    return first, tl.load(offset_ptr + token + 1, mask=keep, other=1) - first


@triton.jit
def rank_of(word_ptr, token, keep, c, length):
    """How many clusters before c each token is in."""
    rank = tl.where(keep, 0, 0)
    for word in range(0, c // 32 + 1):
        bits = tl.load(word_ptr + word * length + token, mask=keep, other=0)
        below = tl.minimum(c - 32 * word, 31)
        mask = (tl.full((), 1, tl.int32) << below) - 1
        rank += tl.where(c - 32 * word >= 32, ones_of(bits), ones_of(bits & mask))
    return rank


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def cluster_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    index_ptr, word_ptr, offset_ptr,  # of `Selection`
    out_ptr, out_b, out_h, out_n,
    slot_ptr, lse_ptr,  # (B·H, K·w, D) in the order by token, (B·H, K, w)
    length, window, num_batches, num_heads, tiles,
    K: tl.constexpr, CAUSAL: tl.constexpr, SINGLE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of the queries of one cluster. SINGLE: the tile is all, queries and keys."""
    tile, c, head, b, h = place_in_cluster(tl.program_id(0), tiles, num_heads, K)
    heads = num_batches * num_heads
    WORDS: tl.constexpr = (K + 31) // 32
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    out_ptr += b * out_b + h * out_h
    query_ptr, key_ptr = index_ptr + (head * K + c) * window, index_ptr + ((heads + head) * K + c) * window
    query, query_keep = members(query_ptr, tile * BLOCK_W, window, length, BLOCK_W)
    q = gather_rows(q_ptr, q_n, query, query_keep, HEAD_DIM, BLOCK_D).to(COMPUTE)
    q_hat, _ = normalise(q, HEAD_DIM, BLOCK_D)
    q_hat = (q_hat * (HEAD_DIM**-0.5 * LOG2E)).to(UNIT)
    peak = tl.full((BLOCK_W,), NEVER, COMPUTE)
    mass, out = tl.zeros((BLOCK_W,), COMPUTE), tl.zeros((BLOCK_W, BLOCK_D), COMPUTE)
    for start in range(0, BLOCK_W if SINGLE else window, BLOCK_W):
        key, key_keep, k_hat, v = key_tile(
            k_ptr, k_n, v_ptr, v_n, key_ptr, start, window, length, HEAD_DIM, BLOCK_W, BLOCK_D, COMPUTE
        )
        scores = product(q_hat, tl.trans(k_hat), COMPUTE, UNIT, PRECISION)
        visible = key_keep[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= query[:, None])
        scores = tl.where(visible, scores, NEVER)
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        decay = tl.exp2(peak - higher)
        mass = mass * decay + tl.sum(weights, axis=1)
        out = out * decay[:, None] + product(weights, v, COMPUTE, OPERAND, PRECISION)
        peak = higher
    out = out / mass[:, None]
    slot = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    tl.store(lse_ptr + (head * K + c) * window + slot, peak + tl.log2(mass), mask=slot < window)

    first, count = clusters_of(offset_ptr + head * (length + 1), query, query_keep)
    if SINGLE:
        alone = query_keep & (count == 1)
        scatter_rows(out_ptr, out_n, query, alone, out, HEAD_DIM, BLOCK_D)
        shared = query_keep & (count > 1)
    else:  # the backward pass needs every o_ci
        shared = query_keep
    row = first + rank_of(word_ptr + head * WORDS * length, query, shared, c, length)
    scatter_rows(slot_ptr + head * K * window * HEAD_DIM, HEAD_DIM, row, shared, out, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def combine_kernel(
    offset_ptr, slot_ptr,
    out_ptr, out_b, out_h, out_n,
    length, slots, num_heads, splits, chunk,
    SINGLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Mean of the results of each token, zero without any; with SINGLE those of one cluster are there already."""
    b, h, part = place(tl.program_id(0), num_heads, splits)
    head = b * num_heads + h
    out_ptr += b * out_b + h.to(tl.int64) * out_h
    slot_ptr += head * slots * HEAD_DIM
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        inside = token < length
        first, count = clusters_of(offset_ptr + head * (length + 1), token, inside)
        total = sum_of_slots(slot_ptr, first, count, 1 if SINGLE else 0, HEAD_DIM, BLOCK_N, BLOCK_D, COMPUTE)
        if SINGLE:
            inside = inside & (count != 1)
        scatter_rows(
            out_ptr, out_n, token, inside, total / tl.maximum(count, 1).to(COMPUTE)[:, None], HEAD_DIM, BLOCK_D
        )


@triton.jit
def sum_of_slots(
    slot_ptr, first, count, above, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sum of the `count` rows from `first` on, for tokens with more than `above` of them."""
    total = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    rows = tl.where(count > above, count, 0)
    for r in range(0, tl.max(rows, axis=0)):
        total += gather_rows(slot_ptr, HEAD_DIM, first + r, r < rows, HEAD_DIM, BLOCK_D).to(COMPUTE)
    return total


# ------------------------------------------------------------------------------------------------------------ launches


def unit(dtype: torch.dtype) -> tl.dtype:
    """Operand of products of normalised vectors, whose entries are at most √D: half precisions take float16."""
    return tl.float16 if dtype.itemsize == 2 else arithmetic(dtype)["OPERAND"]


def cluster_flags(q: Tensor, clusters: int, window: int, causal: bool) -> tuple[int, dict]:
    """Tiles of a cluster, and the constants of a launch by cluster; SINGLE where it is one tile."""
    width = block_dim(q.shape[-1])
    tile = min(TILE[q.element_size()][width], max(16, triton.next_power_of_2(window)))
    tiles = triton.cdiv(window, tile)
    flags = dict(
        K=clusters, CAUSAL=causal, SINGLE=tiles == 1, HEAD_DIM=q.shape[-1], BLOCK_W=tile, BLOCK_D=width,
        UNIT=unit(q.dtype), **arithmetic(q.dtype),
    )  # fmt: skip
    return tiles, flags


def clusters(
    q: Tensor, k: Tensor, v: Tensor, chosen: Selection, out: Tensor, num_clusters: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Write the routing heads of `out`; returns log-sums (B·H, K, w), and, for windows of several tiles, every o_ci."""
    batch, _, length, dim = q.shape
    rows, window = chosen.members.shape[1], chosen.members.shape[3]
    heads = rows // batch
    tiles, flags = cluster_flags(q, num_clusters, window, causal)
    single = flags["SINGLE"]
    lse = torch.empty(rows, num_clusters, window, dtype=state_dtype(q.dtype), device=q.device)
    slots = torch.empty(rows, num_clusters * window, dim, dtype=q.dtype, device=q.device)
    cluster_kernel[(rows * num_clusters * tiles,)](
        q, *strides(q), k, *strides(k), v, *strides(v), chosen.members, chosen.words, chosen.offsets,
        out, *strides(out), slots, lse, length, window, batch, heads, tiles,
        **flags, num_warps=cluster_warps(flags["BLOCK_W"]), num_stages=1 if single else 2,
    )  # fmt: skip
    tile = COMBINE_TILE // flags["BLOCK_D"]
    splits, chunk = split(length, tile, rows)
    combine_kernel[(rows * splits,)](
        chosen.offsets, slots, out, *strides(out), length, num_clusters * window, heads, splits, chunk,
        SINGLE=single, HEAD_DIM=dim, BLOCK_N=tile, BLOCK_D=flags["BLOCK_D"], COMPUTE=flags["COMPUTE"], num_warps=4,
    )  # fmt: skip
    return lse, q.new_empty(0) if single else slots


def cluster_warps(tile: int) -> int:
    """Warps of a program that holds tile² scores."""
    return 8 if tile > 64 else 4
