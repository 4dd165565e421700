"""Routing attention: validation and dispatch."""

from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.common.dispatch import choose_impl, resolve_impl
from kernels.common.inputs import check_positive
from kernels.common.layout import compute_dtype, heads_last
from kernels.routing import reference
from kernels.routing.centroids import cluster_scores, layer_norm, move, zero_padding

IMPLEMENTATIONS = ("reference", "triton")


class RoutingOutput(NamedTuple):
    """What one call gives: the attention, and what trains the centroids."""

    out: Tensor
    """(B, H, N, D), in the contract's form."""
    commitment: Tensor
    """Scalar, unweighted: mean over real tokens, routing heads and features of (q̂ − μ)², plus the same of k̂."""
    counts: Tensor
    """(H_r, K): real queries and keys whose best centroid this is, over the batch; detached."""
    sums: Tensor
    """(H_r, K, D): the sum of those normalised vectors; detached."""


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    *,
    window: int,
    local_window: int,
    key_mask: Tensor | None = None,
    causal: bool = False,
    impl: str = "auto",
    members: Tensor | None = None,
) -> RoutingOutput:
    """Routing attention on the first H_r heads, local attention on the others.

    q, k, v        (B, H, N, D)
    centroids      (H_r, K, D), 1 <= H_r <= H; they get no gradient
    window         tokens of a cluster; it holds all real tokens where there are fewer
    local_window   block of a local head, which sees its own block and the neighbours; N where N is shorter
    key_mask       (B, N) bool, True = real token
    causal         a query sees keys at or before its own position. The members of a cluster are chosen over the
                   whole sequence, as published: later tokens can decide *whether* an earlier one is in a cluster
    members        who is in each cluster, as `select` gives it, instead of the nearest; only the reference takes it

    Raises ValueError for impossible sizes. Formulas and source: `kernels.routing.reference`.
    """
    check_positive(window=window, local_window=local_window)
    refusal = None if members is None else "chooses the members itself"
    chosen = choose_impl(impl, q, IMPLEMENTATIONS, "routing", refusal)
    heads, dim = q.shape[1], q.shape[3]
    if centroids.dim() != 3 or not 1 <= centroids.shape[0] <= heads or centroids.shape[2] != dim:
        raise ValueError(
            f"centroids must be (routing heads, clusters, head_dim) with at most {heads} heads of {dim}, "
            f"got {tuple(centroids.shape)}"
        )
    if chosen == "triton":
        from kernels.routing import ops  # Triton is needed only here

        return RoutingOutput(*ops.routing_attention(q, k, v, centroids, window, local_window, key_mask, causal))
    out, *rest = reference.routing_attention(q, k, v, centroids, window, local_window, key_mask, causal, members)
    return RoutingOutput(heads_last(out, key_mask, q.dtype), *rest)


@torch.no_grad()
def select(
    q: Tensor, k: Tensor, centroids: Tensor, *, window: int, key_mask: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Who is in each cluster, as a call that is not causal chooses: ascending positions, N in empty slots.

    (2, B, H_r, K, w) int64, the queries first, w = min(window, N); arguments as in `routing_attention`.
    """
    if choose_impl(impl, q, IMPLEMENTATIONS, "routing") == "triton":
        from kernels.routing import ops

        return ops.select(q, k, centroids, window, key_mask)
    return torch.stack([reference.membership(_scores(x, centroids, key_mask), window, key_mask) for x in (q, k)])


@torch.no_grad()
def preference(q: Tensor, k: Tensor, centroids: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """cos(μ_c, x̂_i), of which `select` takes the largest: (2, B, H_r, K, N + 1), −inf for padding, −2 for no token."""
    scores = torch.stack([_scores(x, centroids, key_mask) for x in (q, k)])
    cosines = scores / (sqrt(q.shape[3]) * centroids.norm(dim=-1).clamp_min(1e-30)[..., None])
    if key_mask is not None:
        cosines = cosines.masked_fill(~key_mask[:, None, None], -inf)
    return F.pad(cosines, (0, 1), value=-2.0)


def _scores(x: Tensor, centroids: Tensor, key_mask: Tensor | None) -> Tensor:
    """s_ci of queries or keys, which may have more heads than the routing ones: (B, H_r, K, N)."""
    x = zero_padding(x[:, : centroids.shape[0]].to(compute_dtype(x.dtype)), key_mask)
    return cluster_scores(layer_norm(x), centroids.to(x.dtype))


@torch.no_grad()
def move_centroids(
    ema_counts: Tensor,
    ema_sums: Tensor,
    centroids: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    impl: str = "auto",
) -> None:
    """Running counts N (H_r, K) and sums M (H_r, K, D) after a call, and the centroids they give, all in place.

    N <- λ N + (1-λ) counts,  M <- λ M + (1-λ) sums,  μ_c = M_c / N'_c with λ = `decay`; N' is N with a small floor.
    """
    counts, sums = counts.to(ema_counts), sums.to(ema_sums)
    if resolve_impl(impl, centroids.device, IMPLEMENTATIONS) == "triton":
        from kernels.routing import ops

        ops.move(ema_counts, ema_sums, centroids, counts.contiguous(), sums.contiguous(), decay)
    else:
        move(ema_counts, ema_sums, centroids, counts, sums, decay)


@torch.no_grad()
def coverage(x: Tensor, centroids: Tensor, window: int, key_mask: Tensor | None = None) -> Tensor:
    """Share of the real tokens of x, queries or keys, that are in at least one cluster: (H_r,); NaN without any.

    x, centroids, window, key_mask   as in `routing_attention`; x may have more heads than the routing ones
    """
    index = reference.membership(_scores(x, centroids, key_mask), window, key_mask)
    empty_slot = x.shape[2]
    covered = x.new_zeros(*index.shape[:2], empty_slot + 1, dtype=torch.bool).scatter(2, index.flatten(2), True)
    real = x.shape[0] * x.shape[2] if key_mask is None else key_mask.sum()
    return covered[..., :empty_slot].sum((0, 2)) / real
