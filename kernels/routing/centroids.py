"""Online k-means of routing attention: what assigns tokens to centroids, and what moves the centroids.

All of it is outside autograd. Shapes: tokens (B, H, N, D), centroids (H, K, D), counts (H, K), sums (H, K, D).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6
COUNT_EPS = 1e-5


def layer_norm(x: Tensor) -> Tensor:
    """x̂: LayerNorm over the last dimension without gain and bias, so that ‖x̂‖ = √D."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def zero_padding(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """x (B, H, N, D) with zeros in padded rows, which then neither give nor get anything."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0.0)


def cluster_scores(x: Tensor, centroids: Tensor) -> Tensor:
    """s_ci = μ_c · x̂_i of normalised tokens: (B, H, K, N)."""
    return torch.einsum("hcd,bhnd->bhcn", centroids, x.detach())


def statistics(x: Tensor, assignment: Tensor, num_clusters: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Counts and sums of the real tokens whose best cluster, `assignment` (B, H, N), this is."""
    one_hot = (assignment[..., None] == torch.arange(num_clusters, device=x.device)).to(x.dtype)  # (B, H, N, K)
    if key_mask is not None:
        one_hot = one_hot * key_mask[:, None, :, None]
    return one_hot.sum((0, 2)), torch.einsum("bhnc,bhnd->hcd", one_hot, x.detach())


def sample_centroids(x: Tensor, centroids: Tensor, key_mask: Tensor | None) -> Tensor:
    """K random real tokens a head, without repetition; where tokens run out, the centroid that was there.

    Draws from torch's global generator of the device.
    """
    tokens = x.transpose(0, 1).flatten(1, 2)  # (H, B·N, D)
    lot = torch.rand(tokens.shape[:2], device=x.device)
    if key_mask is not None:
        lot = lot.masked_fill(~key_mask.flatten(), -1.0)
    drawn, index = lot.topk(min(centroids.shape[1], tokens.shape[1]), dim=-1)
    chosen = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
    missing = centroids.shape[1] - index.shape[1]
    real = F.pad(drawn >= 0, (0, missing))[..., None]
    return torch.where(real, F.pad(chosen, (0, 0, 0, missing)), centroids)


def lloyd_centroids(counts: Tensor, sums: Tensor, centroids: Tensor) -> Tensor:
    """One Lloyd step on the sphere: μ_c = LayerNorm(Σ x̂_i), so that ‖μ_c‖ = √D; an empty cluster stays."""
    return torch.where(counts[..., None] > 0, layer_norm(sums), centroids)


def smoothed_counts(counts: Tensor) -> Tensor:
    """N'_c = (N_c + ε) / (Σ N + K ε) · Σ N, so that an empty cluster has a weight; 1 while nothing was counted."""
    total = counts.sum(-1, keepdim=True)
    smoothed = (counts + COUNT_EPS) / (total + counts.shape[-1] * COUNT_EPS) * total
    return smoothed.where(total > 0, torch.ones_like(total))


def mean_centroids(counts: Tensor, sums: Tensor) -> Tensor:
    """μ_c = M_c / N'_c from running counts N and running sums M."""
    return sums / smoothed_counts(counts)[..., None]


def move(ema_counts: Tensor, ema_sums: Tensor, centroids: Tensor, counts: Tensor, sums: Tensor, decay: float) -> None:
    """N <- λ N + (1-λ) counts, M <- λ M + (1-λ) sums, μ_c = M_c / N'_c, all in place."""
    ema_counts.lerp_(counts, 1 - decay)
    ema_sums.lerp_(sums, 1 - decay)
    centroids.copy_(mean_centroids(ema_counts, ema_sums))
