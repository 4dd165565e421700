"""Routing attention's backward pass in Triton, by clusters as the forward pass.

The selection is not differentiated: it is read as the forward pass left it. The gradient of the commitment loss and of
the normalisation join where a row is finished.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import COUNTS, mask_arguments, split, strides
from kernels.common.tiles import (
    LOG2E,
    NEVER,
    gather_rows,
    load_rows,
    place,
    product,
    real_rows,
    scatter_rows,
    store_rows,
)
from kernels.routing.triton import (
    cluster_flags,
    cluster_warps,
    clusters_of,
    key_tile,
    members,
    place_in_cluster,
    rank_of,
    sum_of_slots,
)
from kernels.routing.triton_score import normalise, rows_of_side

FINISH_TILE = 2048
"""Elements of a tile of 4 warps."""


@triton.jit
def normalise_backward(grad, x_hat, scale, HEAD_DIM: tl.constexpr):
    """Gradient of x from that of x̂: (g − mean(g) − x̂ mean(g x̂)) / √(variance + ε)."""
    mean = tl.sum(grad, axis=1) / HEAD_DIM
    along = tl.sum(grad * x_hat, axis=1) / HEAD_DIM
    return (grad - mean[:, None] - x_hat * along[:, None]) * scale[:, None]


@triton.jit
def commitment_gradient(
    x_hat, best_ptr, centroid_ptr, pull, token, keep, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """pull · (x̂ − μ_best) of each token."""
    best = tl.load(best_ptr + token, mask=keep, other=0)
    return pull * (x_hat - gather_rows(centroid_ptr, HEAD_DIM, best, keep, HEAD_DIM, BLOCK_D).to(COMPUTE))


@triton.jit
def visible_pairs(query, query_keep, key, key_keep, CAUSAL: tl.constexpr):
    """Which queries of a tile see which keys."""
    visible = query_keep[:, None] & key_keep[None, :]
    return visible & (key[None, :] <= query[:, None]) if CAUSAL else visible


@triton.jit
def cluster_gradients(
    q_hat, k_hat, v, grad, lse, delta, visible, HAS_DELTA: tl.constexpr, HEAD_DIM: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P, and dS = P (dP − δ) / √D with dP = do vᵀ and δ = Σ_j P dP, which one tile knows by itself."""
    scores = product(q_hat * (HEAD_DIM**-0.5 * LOG2E), tl.trans(k_hat), COMPUTE, UNIT, PRECISION)
    weights = tl.exp2(tl.where(visible, scores - lse[:, None], NEVER))
    grad_weights = product(grad, tl.trans(v), COMPUTE, OPERAND, PRECISION)
    if not HAS_DELTA:
        delta = tl.sum(weights * grad_weights, axis=1)
    return weights, weights * (grad_weights - delta[:, None]) * (HEAD_DIM**-0.5)


@triton.jit
def query_tile(
    q_ptr, q_n, grad_ptr, grad_n, offset_ptr, word_ptr, slot_ptr, lse_ptr, index_ptr, c, start, window, length,
    SINGLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What the backward pass needs of a tile of queries: positions, x̂, do_ci, log-sum and δ."""
    query, keep = members(index_ptr, start, window, length, BLOCK_W)
    q_hat, _ = normalise(gather_rows(q_ptr, q_n, query, keep, HEAD_DIM, BLOCK_D).to(COMPUTE), HEAD_DIM, BLOCK_D)
    first, count = clusters_of(offset_ptr, query, keep)
    grad = gather_rows(grad_ptr, grad_n, query, keep, HEAD_DIM, BLOCK_D).to(COMPUTE) / count.to(COMPUTE)[:, None]
    slot = start + tl.arange(0, BLOCK_W)
    lse = tl.load(lse_ptr + slot, mask=slot < window, other=0.0)
    delta = tl.zeros((BLOCK_W,), COMPUTE)
    if not SINGLE:
        row = first + rank_of(word_ptr, query, keep, c, length)
        delta = tl.sum(gather_rows(slot_ptr, HEAD_DIM, row, keep, HEAD_DIM, BLOCK_D).to(COMPUTE) * grad, axis=1)
    return query, keep, q_hat, grad, lse, delta


@triton.jit
def deliver(
    grad_hat, x_ptr, x_n, token, keep, c, length,
    grad_ptr, grad_n, slot_ptr, best_ptr, centroid_ptr, word_ptr, offset_ptr, pull,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Finish the rows of tokens that are in this cluster only; leave those of the others to `finish_kernel`.

    Their rows are read again: in registers they would be spilled meanwhile. Returns the rows in the order by token, and
    which tokens are of either kind.
    """
    first, count = clusters_of(offset_ptr, token, keep)
    alone, shared = keep & (count == 1), keep & (count > 1)
    row = first + rank_of(word_ptr, token, shared, c, length)
    scatter_rows(slot_ptr, HEAD_DIM, row, shared, grad_hat, HEAD_DIM, BLOCK_D)
    x_hat, scale = normalise(gather_rows(x_ptr, x_n, token, alone, HEAD_DIM, BLOCK_D).to(COMPUTE), HEAD_DIM, BLOCK_D)
    grad_hat += commitment_gradient(x_hat, best_ptr, centroid_ptr, pull, token, alone, HEAD_DIM, BLOCK_D, COMPUTE)
    grad = normalise_backward(grad_hat, x_hat, scale, HEAD_DIM)
    scatter_rows(grad_ptr, grad_n, token, alone, grad, HEAD_DIM, BLOCK_D)
    return row, alone, shared


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def cluster_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    grad_ptr, grad_b, grad_h, grad_n,
    index_ptr, word_ptr, offset_ptr, best_ptr, centroid_ptr, pull_ptr, grad_loss_ptr, slot_ptr, lse_ptr,
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    grad_slot_ptr,  # (3, B·H, K·w, D): of q̂, k̂ and v, in the orders by token
    length, window, num_batches, num_heads, tiles,
    K: tl.constexpr, CAUSAL: tl.constexpr, SINGLE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of the queries and one tile of the keys of a cluster."""
    tile, c, head, b, h = place_in_cluster(tl.program_id(0), tiles, num_heads, K)
    heads = num_batches * num_heads
    WORDS: tl.constexpr = (K + 31) // 32
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    grad_ptr += b * grad_b + h * grad_h
    grad_q_ptr += b * gq_b + h * gq_h
    grad_k_ptr += b * gk_b + h * gk_h
    grad_v_ptr += b * gv_b + h * gv_h
    centroid_ptr += h * K * HEAD_DIM
    query_ptr, key_ptr = index_ptr + (head * K + c) * window, index_ptr + ((heads + head) * K + c) * window
    lse_ptr += (head * K + c) * window
    slots = K * window * HEAD_DIM
    slot_ptr += head * slots
    q_words, k_words = word_ptr + head * WORDS * length, word_ptr + (heads + head) * WORDS * length
    q_offsets, k_offsets = offset_ptr + head * (length + 1), offset_ptr + (heads + head) * (length + 1)
    pull = tl.load(pull_ptr) * tl.load(grad_loss_ptr).to(COMPUTE)
    own = tile * BLOCK_W

    query, query_keep, q_hat, grad, lse, delta = query_tile(
        q_ptr, q_n, grad_ptr, grad_n, q_offsets, q_words, slot_ptr, lse_ptr, query_ptr, c, own, window, length,
        SINGLE, HEAD_DIM, BLOCK_W, BLOCK_D, COMPUTE,
    )  # fmt: skip
    key, key_keep, k_hat, v = key_tile(
        k_ptr, k_n, v_ptr, v_n, key_ptr, own, window, length, HEAD_DIM, BLOCK_W, BLOCK_D, COMPUTE
    )
    if SINGLE:
        visible = visible_pairs(query, query_keep, key, key_keep, CAUSAL)
        weights, grad_scores = cluster_gradients(
            q_hat, k_hat, v, grad, lse, delta, visible, False, HEAD_DIM, COMPUTE, OPERAND, UNIT, PRECISION
        )
        grad_q = product(grad_scores, k_hat, COMPUTE, OPERAND, PRECISION)
        grad_k = product(tl.trans(grad_scores), q_hat, COMPUTE, OPERAND, PRECISION)
        grad_v = product(tl.trans(weights), grad, COMPUTE, OPERAND, PRECISION)
    else:
        grad_q = tl.zeros((BLOCK_W, BLOCK_D), COMPUTE)
        grad_k, grad_v = tl.zeros((BLOCK_W, BLOCK_D), COMPUTE), tl.zeros((BLOCK_W, BLOCK_D), COMPUTE)
        for start in range(0, window, BLOCK_W):
            other, other_keep, other_hat, other_v = key_tile(
                k_ptr, k_n, v_ptr, v_n, key_ptr, start, window, length, HEAD_DIM, BLOCK_W, BLOCK_D, COMPUTE
            )
            visible = visible_pairs(query, query_keep, other, other_keep, CAUSAL)
            weights, grad_scores = cluster_gradients(
                q_hat, other_hat, other_v, grad, lse, delta, visible, True, HEAD_DIM, COMPUTE, OPERAND, UNIT, PRECISION
            )
            grad_q += product(grad_scores, other_hat, COMPUTE, OPERAND, PRECISION)
        for start in range(0, window, BLOCK_W):
            other, other_keep, other_hat, other_grad, other_lse, other_delta = query_tile(
                q_ptr, q_n, grad_ptr, grad_n, q_offsets, q_words, slot_ptr, lse_ptr, query_ptr, c, start, window,
                length, SINGLE, HEAD_DIM, BLOCK_W, BLOCK_D, COMPUTE,
            )  # fmt: skip
            visible = visible_pairs(other, other_keep, key, key_keep, CAUSAL)
            weights, grad_scores = cluster_gradients(
                other_hat, k_hat, v, other_grad, other_lse, other_delta, visible, True,
                HEAD_DIM, COMPUTE, OPERAND, UNIT, PRECISION,
            )  # fmt: skip
            grad_k += product(tl.trans(grad_scores), other_hat, COMPUTE, OPERAND, PRECISION)
            grad_v += product(tl.trans(weights), other_grad, COMPUTE, OPERAND, PRECISION)

    deliver(
        grad_q, q_ptr, q_n, query, query_keep, c, length, grad_q_ptr, gq_n, grad_slot_ptr + head * slots,
        best_ptr + head * length, centroid_ptr, q_words, q_offsets, pull, HEAD_DIM, BLOCK_D, COMPUTE,
    )  # fmt: skip
    row, alone, shared = deliver(
        grad_k, k_ptr, k_n, key, key_keep, c, length, grad_k_ptr, gk_n, grad_slot_ptr + (heads + head) * slots,
        best_ptr + (heads + head) * length, centroid_ptr, k_words, k_offsets, pull, HEAD_DIM, BLOCK_D, COMPUTE,
    )  # fmt: skip
    scatter_rows(grad_v_ptr, gv_n, key, alone, grad_v, HEAD_DIM, BLOCK_D)
    scatter_rows(grad_slot_ptr + (2 * heads + head) * slots, HEAD_DIM, row, shared, grad_v, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def finish_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    mask_ptr, mask_b, mask_n,
    offset_ptr, best_ptr, centroid_ptr, pull_ptr, grad_loss_ptr, grad_slot_ptr,
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    length, slots, num_batches, num_heads, splits, chunk,
    K: tl.constexpr, HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """dq (side 0) or dk and dv (side 1) of the tokens that are in no cluster or in several; zero for padded ones."""
    b, h, part = place(tl.program_id(0), num_heads, splits)
    side, wide_h, heads = tl.program_id(1), h.to(tl.int64), num_batches * num_heads
    x_ptr, x_n = rows_of_side(side, b, wide_h, q_ptr, q_b, q_h, q_n, k_ptr, k_b, k_h, k_n)
    grad_ptr, grad_n = rows_of_side(side, b, wide_h, grad_q_ptr, gq_b, gq_h, gq_n, grad_k_ptr, gk_b, gk_h, gk_n)
    grad_v_ptr += b * gv_b + wide_h * gv_h
    mask_ptr += b * mask_b
    centroid_ptr += h * K * HEAD_DIM
    head = side * heads + b * num_heads + h
    best_ptr += head * length
    pull = tl.load(pull_ptr) * tl.load(grad_loss_ptr).to(COMPUTE)
    offset_n = tl.arange(0, BLOCK_N)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_N):
        token = start + offset_n
        inside = token < length
        first, count = clusters_of(offset_ptr + head * (length + 1), token, inside)
        mine = inside & (count != 1)
        real = mine & real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)
        x_hat, scale = normalise(
            load_rows(x_ptr, x_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE), HEAD_DIM, BLOCK_D
        )
        grad_hat = sum_of_slots(
            grad_slot_ptr + head * slots * HEAD_DIM, first, count, 1, HEAD_DIM, BLOCK_N, BLOCK_D, COMPUTE
        )
        grad_hat += commitment_gradient(x_hat, best_ptr, centroid_ptr, pull, token, real, HEAD_DIM, BLOCK_D, COMPUTE)
        grad = tl.where(real[:, None], normalise_backward(grad_hat, x_hat, scale, HEAD_DIM), 0.0)
        store_rows(grad_ptr, grad_n, start, offset_n, mine, grad, HEAD_DIM, BLOCK_D)
        if side == 1:
            grad_v = sum_of_slots(
                grad_slot_ptr + (heads + head) * slots * HEAD_DIM, first, count, 1, HEAD_DIM, BLOCK_N, BLOCK_D, COMPUTE
            )
            store_rows(grad_v_ptr, gv_n, start, offset_n, mine, grad_v, HEAD_DIM, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ launches


def clusters_backward(
    grad: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, index: Tensor,
    words: Tensor, offsets: Tensor, best: Tensor, centroids: Tensor, pull: Tensor, lse: Tensor, slots: Tensor,
    grads: list[Tensor], causal: bool,
) -> None:  # fmt: skip
    """Write the routing heads of dq, dk, dv."""
    batch, _, length, dim = q.shape
    heads, num_clusters, _ = centroids.shape
    window, rows = index.shape[3], batch * heads
    tiles, flags = cluster_flags(q, num_clusters, window, causal)
    grad_slots = torch.empty(3, rows, num_clusters * window, dim, dtype=q.dtype, device=q.device)
    to = [y for x in grads for y in (x, *strides(x))]
    cluster_backward_kernel[(rows * num_clusters * tiles,)](
        q, *strides(q), k, *strides(k), v, *strides(v), grad, *strides(grad),
        index, words, offsets, best, centroids, pull, grad_loss, slots, lse, *to, grad_slots,
        length, window, batch, heads, tiles,
        **flags, num_warps=cluster_warps(flags["BLOCK_W"]), num_stages=1,
    )  # fmt: skip
    tile = FINISH_TILE // flags["BLOCK_D"]
    splits, chunk = split(length, tile, 2 * rows)
    finish_kernel[(rows * splits, 2)](
        q, *strides(q), k, *strides(k), *mask_arguments(key_mask, q), offsets, best, centroids, pull, grad_loss,
        grad_slots, *to, length, num_clusters * window, batch, heads, splits, chunk,
        K=num_clusters, HAS_MASK=key_mask is not None, HEAD_DIM=dim, BLOCK_N=tile, BLOCK_D=flags["BLOCK_D"],
        COMPUTE=flags["COMPUTE"], num_warps=4,
    )  # fmt: skip
