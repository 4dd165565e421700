"""The classic baselines from their definitions, in float64: dense N×N weights or loops over tokens and segments."""

import torch
from oracles.softmax import softmax_attention
from torch import Tensor


def visible_pairs(q: Tensor, key_mask: Tensor | None, causal: bool) -> Tensor:
    """(B, 1, N, N) ones and zeros: both tokens real and, with `causal`, the key not after the query."""
    batch, _, length, _ = q.shape
    real = torch.ones(batch, length, dtype=torch.bool) if key_mask is None else key_mask
    pairs = (real[:, :, None] & real[:, None, :]).double()
    return (pairs.tril() if causal else pairs)[:, None]


def weighted_mean(weights: Tensor, v: Tensor, epsilon: float = 0.0) -> Tensor:
    """Σ_j w_ij v_j / (Σ_j w_ij + ε); zero where all weights are zero."""
    total = weights.sum(-1, keepdim=True)
    return weights @ v / (total + epsilon).masked_fill(total == 0, 1.0)


def linear(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Weights φ(q_i)·φ(k_j) with φ(x) = x + 1 above zero and e^x below, and the published ε = 1e-6."""

    def features(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))

    weights = torch.einsum("bhif,bhjf->bhij", features(q), features(k))
    return weighted_mean(weights * visible_pairs(q, key_mask, causal), v, 1e-6)


def performer(
    q: Tensor, k: Tensor, v: Tensor, directions: Tensor, key_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Weights 1/F Σ_l exp(w_l·q - ‖q‖²/2) exp(w_l·k - ‖k‖²/2) with q and k over D^¼; directions (F, D)."""

    def features(x: Tensor) -> Tensor:
        x = x / x.shape[-1] ** 0.25
        logs = torch.einsum("ld,bhnd->bhnl", directions, x) - 0.5 * torch.einsum("bhnd,bhnd->bhn", x, x)[..., None]
        return torch.exp(logs) / len(directions) ** 0.5

    weights = torch.einsum("bhif,bhjf->bhij", features(q), features(k))
    return weighted_mean(weights * visible_pairs(q, key_mask, causal), v)


def linformer(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Softmax attention of every query to R rows Σ_j E_rj k_j over the real j; projection (H, R, max_length)."""
    batch, heads, length, dim = q.shape
    out = torch.zeros_like(q)
    for b in range(batch):
        real = [j for j in range(length) if key_mask is None or key_mask[b, j]]
        for h in range(heads):
            keys = torch.einsum("rj,jd->rd", projection[h][:, real], k[b, h, real])
            values = torch.einsum("rj,jd->rd", projection[h][:, real], v[b, h, real])
            weights = torch.exp(q[b, h, real] @ keys.T / dim**0.5)
            out[b, h, real] = weights @ values / weights.sum(1, keepdim=True)
    return out


def nystromformer(
    q: Tensor, k: Tensor, v: Tensor, landmarks: int, iterations: int, key_mask: Tensor | None = None
) -> Tensor:
    """The three softmax matrices on the real tokens alone, token r of n in segment ⌊r · landmarks / n⌋."""

    def softmax(rows: Tensor, columns: Tensor) -> Tensor:
        weights = torch.exp(rows @ columns.T / rows.shape[-1] ** 0.5)
        return weights / weights.sum(1, keepdim=True)

    batch, heads, length, _ = q.shape
    out = torch.zeros_like(q)
    for b in range(batch):
        real = [j for j in range(length) if key_mask is None or key_mask[b, j]]
        segments: dict[int, list[int]] = {}
        for r in range(len(real)):
            segments.setdefault(r * landmarks // len(real), []).append(r)
        for h in range(heads if real else 0):
            query, key, value = q[b, h, real], k[b, h, real], v[b, h, real]
            query_means = torch.stack([query[members].mean(0) for members in segments.values()])
            key_means = torch.stack([key[members].mean(0) for members in segments.values()])
            a = softmax(query_means, key_means)
            one = torch.eye(len(a), dtype=a.dtype)
            z = a.T / (a.sum(0).max() * a.sum(1).max())  # ‖A‖₁ ‖A‖∞
            for _ in range(iterations):
                z = 0.25 * z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z)))
            out[b, h, real] = softmax(query, key_means) @ z @ softmax(query_means, key) @ value
    return out


def local(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, key_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Dense softmax attention of each block by itself."""
    blocks = []
    for start in range(0, q.shape[2], block_size):
        here = slice(start, start + block_size)
        mask = None if key_mask is None else key_mask[:, here]
        blocks.append(softmax_attention(q[:, :, here], k[:, :, here], v[:, :, here], mask, causal))
    return torch.cat(blocks, dim=2)
