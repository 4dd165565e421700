"""Routing attention by its definition: one sequence, one head, one query at a time, in float64."""

from math import sqrt

import torch
from torch import Tensor


def normalised(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-6) over the last dimension."""
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / torch.sqrt((centred * centred).sum(-1, keepdim=True) / x.shape[-1] + 1e-6)


def members(x_hat: Tensor, centroid: Tensor, window: int, real: list[int]) -> list[int]:
    """The `window` real positions of largest centroid · x̂, the lower position first among equals, ascending."""
    score = {i: float(sum(c * x for c, x in zip(centroid.tolist(), x_hat[i].tolist(), strict=True))) for i in real}
    return sorted(sorted(real, key=lambda i: (-score[i], i))[:window])


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query (D) over (M, D)."""
    weights = torch.exp(keys @ query / sqrt(len(query)) - (keys @ query).max().detach() / sqrt(len(query)))
    return (weights[:, None] * values).sum(0) / weights.sum()


def routing_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_members: list[list[int]],
    k_members: list[list[int]],
    causal: bool,
) -> Tensor:
    """(N, D) of one head, given the members of its clusters."""
    q_hat, k_hat = normalised(q), normalised(k)
    rows = []
    for i in range(len(q)):
        results = []
        for queries, keys in zip(q_members, k_members, strict=True):
            seen = [j for j in keys if j <= i or not causal]
            if i in queries and seen:
                results.append(attend(q_hat[i], k_hat[seen], v[seen]))
        rows.append(sum(results) / len(results) if results else 0 * v[i])
    return torch.stack(rows)


def local_head(q: Tensor, k: Tensor, v: Tensor, block: int, real: list[int], causal: bool) -> Tensor:
    """(N, D) of one head: real keys at most one block away."""
    rows = []
    for i in range(len(q)):
        seen = [j for j in real if abs(i // block - j // block) <= 1 and (j <= i or not causal)]
        rows.append(attend(q[i], k[seen], v[seen]) if i in real else 0 * v[i])
    return torch.stack(rows)


def nearest(x_hat: Tensor, centroids: Tensor) -> int:
    """The cluster of largest μ · x̂ for one vector (D) and (K, D)."""
    scores = (centroids @ x_hat).tolist()
    return scores.index(max(scores))


def routing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    window: int,
    block: int,
    key_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """(B, H, N, D): the heads that have centroids route, the others are local."""
    out = []
    for b in range(q.shape[0]):
        real = [i for i in range(q.shape[2]) if key_mask is None or key_mask[b, i]]
        heads = []
        for h in range(q.shape[1]):
            head = q[b, h], k[b, h], v[b, h]
            if h >= len(centroids):
                heads.append(local_head(*head, block, real, causal))
                continue
            chosen = [[members(normalised(x), mu, window, real) for mu in centroids[h]] for x in head[:2]]
            heads.append(routing_head(*head, chosen[0], chosen[1], causal))
        out.append(torch.stack(heads))
    return torch.stack(out)


def assignments(x: Tensor, centroids: Tensor, key_mask: Tensor | None = None):
    """Yields (head, cluster, x̂) for every real token of (B, H, N, D), heads with centroids only."""
    for b in range(x.shape[0]):
        for h in range(len(centroids)):
            for i in range(x.shape[2]):
                if key_mask is None or key_mask[b, i]:
                    vector = normalised(x[b, h, i])
                    yield h, nearest(vector, centroids[h]), vector


def commitment(q: Tensor, k: Tensor, centroids: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Mean (q̂ - μ)² plus mean (k̂ - μ)², zero without a real token."""
    total = 0 * q.sum()
    for x in (q, k):
        terms = [((vector - centroids[h, c]) ** 2).sum() for h, c, vector in assignments(x, centroids, key_mask)]
        total = total + sum(terms) / max(1, len(terms) * x.shape[-1])
    return total


def ema_step(
    counts: Tensor, sums: Tensor, centroids: Tensor, q: Tensor, k: Tensor, decay: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Running counts and sums, and the centroids, after one training call."""
    heads, clusters, _ = centroids.shape
    counts, sums, moved = decay * counts, decay * sums, centroids.clone()
    for x in (q, k):
        for h, c, vector in assignments(x.detach(), centroids, key_mask):
            counts[h, c] += 1 - decay
            sums[h, c] += (1 - decay) * vector
    for h in range(heads):
        total = counts[h].sum()
        for c in range(clusters):
            moved[h, c] = sums[h, c] / ((counts[h, c] + 1e-5) * total / (total + clusters * 1e-5))
    return counts, sums, moved
