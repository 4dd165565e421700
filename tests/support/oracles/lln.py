"""LLN attention from its definition: dense weights of one head over its real tokens, no stabilisation at all."""

import math

import torch
from torch import Tensor


def scales(q: Tensor, k: Tensor, key_mask: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """α and β: the real tokens' entries gathered in one list, then the formula of moment matching."""
    sigma_q, sigma_k = (torch.cat([x[i, :, key_mask[i]].flatten() for i in range(len(x))]).std().item() for x in (q, k))
    s = math.sqrt((sigma_q**2 * sigma_k**2 - b) / (2 * a))
    return torch.tensor([s / sigma_q], dtype=q.dtype), torch.tensor([s / sigma_k], dtype=q.dtype)


def lln_weights(q: Tensor, k: Tensor, alpha: Tensor, beta: Tensor, causal: bool = False) -> Tensor:
    """P_ij = κ_ij / Σ_j κ_ij, κ_ij = Σ_l exp(α q_il + β k_jl), for the tokens (n, D) of one head."""
    kernel = torch.exp(alpha * q) @ torch.exp(beta * k).T
    if causal:
        kernel = kernel.tril()
    return kernel / kernel.sum(-1, keepdim=True)


def diag_weights(q: Tensor, k: Tensor, positions: Tensor, causal: bool = False) -> Tensor:
    """Softmax of q kᵀ / √D over the tokens whose position lies in the query's block of D positions."""
    dim = q.shape[-1]
    rows = []
    for i, query in enumerate(positions.tolist()):
        visible = [
            j for j, key in enumerate(positions.tolist()) if key // dim == query // dim and (key <= query or not causal)
        ]
        kernel = torch.exp(k[visible] @ q[i] / math.sqrt(dim))
        rows.append(torch.zeros_like(k[:, 0]).index_add(0, torch.tensor(visible), kernel / kernel.sum()))
    return torch.stack(rows)


def lln(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor,
    alpha: Tensor,
    beta: Tensor,
    mix: tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
) -> Tensor:
    """(B, H, N, D), zero at padded queries; `mix` holds the weights of the two branches, (H, D) each."""
    heads = []
    for b in range(q.shape[0]):
        tokens = key_mask[b].nonzero().squeeze(-1)
        for h in range(q.shape[1]):
            out = torch.zeros_like(q[b, h])
            if len(tokens):
                queries, keys, values = q[b, h, tokens], k[b, h, tokens], v[b, h, tokens]
                rows = lln_weights(queries, keys, alpha, beta, causal) @ values
                if mix is not None:
                    diag = diag_weights(queries, keys, tokens, causal) @ values
                    rows = mix[0][h] * rows + mix[1][h] * diag
                out = out.index_add(0, tokens, rows)
            heads.append(out)
    return torch.stack(heads).unflatten(0, q.shape[:2])
