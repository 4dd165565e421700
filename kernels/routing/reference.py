"""Routing attention in plain PyTorch (Roy, Saffar, Vaswani, Grangier, TACL 2021, arXiv 2003.05997, section 4).

    x̂ = LayerNorm(x), no gain, no bias                  for x = q and x = k; ‖x̂‖ = √D
    s_ci = μ_c · x̂_i                                    one set of centroids μ a head, shared by q and k
    Q_c, K_c = the w tokens of largest s_ci             once over the queries, once over the keys
    o_ci = softmax_j(q̂_i · k̂_j / √D) v_j,  j in K_c     for i in Q_c
    out_i = mean of o_ci over the clusters c with i in Q_c, zero if there are none

A token may be in no cluster, in one or in several. The selection is not differentiated.
"""

from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.common.layout import compute_dtype
from kernels.common.masks import masked_softmax
from kernels.routing.centroids import cluster_scores, layer_norm, statistics, zero_padding


def membership(scores: Tensor, window: int, key_mask: Tensor | None = None) -> Tensor:
    """The `window` best real tokens of each cluster, as ascending positions.

    scores (B, H, K, N) to (B, H, K, w), w = min(window, N). Ties go to the lower position. A cluster with fewer
    than w real tokens ends in empty slots, marked by the position N.
    """
    if key_mask is None:
        return _best(scores, window).sort(dim=-1).values
    real = key_mask[:, None, None, :].expand_as(scores)
    best = _best(scores.masked_fill(~real, float("-inf")), window)
    return best.masked_fill(~real.gather(-1, best), scores.shape[-1]).sort(dim=-1).values


def _best(scores: Tensor, window: int) -> Tensor:
    # A stable sort and not topk, which leaves the order of ties open.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :window]


def cluster_attention(q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor, causal: bool) -> Tensor:
    """Attention of the query members of each cluster to its key members, averaged over the clusters of a query.

    q, k, v            (B, H, N, D), q and k already normalised
    q_index, k_index   (B, H, K, w) positions, N = empty slot
    causal             query i sees key j <= i, by position; a cluster in which it sees no key is left out of its mean
    """
    length, dim = q.shape[-2:]
    rows, keys, values = _gather(q, q_index), _gather(k, k_index), _gather(v, k_index)  # (B, H, K, w, D)
    visible = (k_index < length)[..., None, :].expand(*q_index.shape, -1)  # (B, H, K, w, w)
    if causal:
        visible = visible & (k_index[..., None, :] <= q_index[..., :, None])
    slots = softmax_or_zero(rows @ keys.mT / sqrt(dim), visible) @ values  # (B, H, K, w, D)

    slot_of = q_index.flatten(2)  # (B, H, K·w)
    counted = visible.any(-1).flatten(2).to(q.dtype)
    total = q.new_zeros(*q.shape[:2], length + 1, dim)
    total = total.scatter_add(2, slot_of[..., None].expand(-1, -1, -1, dim), slots.flatten(2, 3))
    count = q.new_zeros(*q.shape[:2], length + 1).scatter_add(2, slot_of, counted)
    return (total / count.clamp_min(1.0)[..., None])[:, :, :length]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, H, N, D) at (B, H, K, w), zero where the slot is empty: (B, H, K, w, D)."""
    padded = F.pad(x, (0, 0, 0, 1))  # the row N
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return padded.gather(2, flat).unflatten(2, index.shape[2:])


def softmax_or_zero(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible entries of the last dimension; a row that sees nothing is zero, as is its gradient."""
    return masked_softmax(logits, visible).masked_fill(~visible, 0.0)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int, key_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q kᵀ / √D) v inside a band of blocks: a query sees its own block, the one before and the one after.

    All (B, H, N, D). With `causal` it sees its own block up to itself, and the block before.
    """
    length, dim = q.shape[-2:]
    block = min(block, length)
    blocks = -(-length // block)
    fill, after = blocks * block - length, 0 if causal else block
    span = 2 * block + after

    def bands(x: Tensor) -> Tensor:  # (B, H, N, D) to (B, H, blocks, span, D)
        return F.pad(x, (0, 0, block, fill + after)).unfold(2, span, block).mT

    rows = F.pad(q, (0, 0, 0, fill)).unflatten(2, (blocks, block))  # (B, H, blocks, block, D)
    real = q.new_ones(q.shape[0], length, dtype=torch.bool) if key_mask is None else key_mask
    visible = F.pad(real, (block, fill + after)).unfold(1, span, block)[:, None, :, None, :]
    if causal:
        offset = torch.arange(span, device=q.device) - block  # of a key, from the first query of the block
        visible = visible & (offset[None, :] <= torch.arange(block, device=q.device)[:, None])
    weights = softmax_or_zero(rows @ bands(k).mT / sqrt(dim), visible)
    return (weights @ bands(v)).flatten(2, 3)[:, :, :length]


def commitment(x: Tensor, centroids: Tensor, assignment: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean over real tokens, heads and features of (x̂ − μ_a)², a = argmax_c s_c; μ gets no gradient."""
    heads = torch.arange(x.shape[1], device=x.device)[:, None]
    error = (x - centroids[heads, assignment]).square().mean((1, 3))  # (B, N)
    if key_mask is None:
        return error.sum() / max(1, error.numel())
    return (error * key_mask).sum() / key_mask.sum().clamp_min(1)


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    window: int,
    local_window: int,
    key_mask: Tensor | None,
    causal: bool,
    members: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Routing on the first H_r heads, local attention on the others; see `kernels.routing.api` for the arguments.

    Returns out (B, H, N, D) and, of the routing heads, the commitment loss, counts (H_r, K) and sums (H_r, K, D).
    """
    dtype = compute_dtype(q.dtype)
    q, k, v = (zero_padding(x.to(dtype), key_mask) for x in (q, k, v))
    centroids = centroids.to(dtype)
    heads, num_clusters = centroids.shape[:2]

    q_hat, k_hat = layer_norm(q[:, :heads]), layer_norm(k[:, :heads])
    scores = cluster_scores(q_hat, centroids), cluster_scores(k_hat, centroids)
    q_index, k_index = (membership(s, window, key_mask) for s in scores) if members is None else members
    out = cluster_attention(q_hat, k_hat, v[:, :heads], q_index, k_index, causal)
    if heads < q.shape[1]:
        local = local_attention(q[:, heads:], k[:, heads:], v[:, heads:], local_window, key_mask, causal)
        out = torch.cat([out, local], dim=1)

    q_best, k_best = (s.argmax(dim=2) for s in scores)  # (B, H_r, N)
    loss = commitment(q_hat, centroids, q_best, key_mask) + commitment(k_hat, centroids, k_best, key_mask)
    q_counts, q_sums = statistics(q_hat, q_best, num_clusters, key_mask)
    k_counts, k_sums = statistics(k_hat, k_best, num_clusters, key_mask)
    return out, loss, q_counts + k_counts, q_sums + k_sums
