"""LLN attention in plain PyTorch: the form that needs neither an eps nor a lucky range of inputs.

The kernel κ_ij = Σ_l exp(α q_il + β k_jl), normalised over j, is a softmax over features after one over tokens:

    λ_l  = logsumexp_j β k_jl                   log-mass of feature l
    C_l  = Σ_j softmax_j(β k_jl) v_j            context of feature l, a convex combination of values
    o_i  = Σ_l softmax_l(α q_il + λ_l) C_l

exactly, so that nothing that is exponentiated exceeds zero.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

NEVER = -1e30
"""Logit of a padded key: far below every real one, yet finite, so that no −inf − (−inf) can become NaN."""

CHUNK = 16
"""Tokens per step of the causal form; a step holds CHUNK² D logits."""


def summarise(k: Tensor, v: Tensor, real: Tensor, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    """Context C (B, H, D, D) and log-mass λ (B, H, D) of the real keys; padded v must be zero.

    Without any real key C is zero and λ is about NEVER.
    """
    logits = (beta * k).masked_fill(~real[:, None, :, None], NEVER)  # (B, H, N, D)
    return logits.softmax(-2).transpose(-2, -1) @ v, logits.logsumexp(-2)


def read(q: Tensor, context: Tensor, log_mass: Tensor, alpha: Tensor | float) -> Tensor:
    """What the queries (B, H, N, D) read from the summary of the keys: softmax_l(α q + λ) C."""
    return torch.softmax(alpha * q + log_mass.unsqueeze(-2), dim=-1) @ context


def read_causal(q: Tensor, k: Tensor, v: Tensor, real: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The same with j ≤ i, chunk by chunk, in O(N).

    A query sees the chunks before its own as D summarised tokens (C, λ), and those of its own chunk one by one, at
    ln κ_ij. Both stand under one softmax; then the chunk joins the summary.
    """
    queries, keys = alpha * q, (beta * k).masked_fill(~real[:, None, :, None], NEVER)
    context = torch.zeros_like(q[..., :1, :]).expand(*q.shape[:2], q.shape[-1], v.shape[-1])  # (B, H, D, D)
    log_mass = torch.full_like(q[..., :1, :], NEVER)  # (B, H, 1, D)
    out = []
    for a, b, values in zip(*(x.split(CHUNK, dim=-2) for x in (queries, keys, v)), strict=True):
        past = a + log_mass  # (B, H, CHUNK, D)
        present = (a.unsqueeze(-2) + b.unsqueeze(-3)).logsumexp(-1)  # (B, H, CHUNK, CHUNK)
        later = torch.ones(present.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weights = torch.cat((past, present.masked_fill(later, NEVER)), dim=-1).softmax(-1)
        out.append(weights @ torch.cat((context, values), dim=-2))

        seen = torch.cat((log_mass, b), dim=-2)  # the summary counts as one more token
        share = seen.softmax(-2).transpose(-2, -1)  # (B, H, D, 1 + CHUNK)
        context = share[..., :1] * context + share[..., 1:] @ values
        log_mass = seen.logsumexp(-2, keepdim=True)
    return torch.cat(out, dim=-2)


def block_softmax(q: Tensor, k: Tensor, v: Tensor, real: Tensor, causal: bool) -> Tensor:
    """Softmax attention inside consecutive blocks of D tokens, the Diag branch; a shorter N is one block."""
    length, block = q.shape[-2:]
    q, k, v = (pad(x, (0, 0, 0, -length % block)).unflatten(2, (-1, block)) for x in (q, k, v))  # (B, H, M, D, D)
    visible = pad(real, (0, -length % block)).unflatten(1, (-1, block))[:, None, :, None, :]  # (B, 1, M, 1, D)
    square = torch.ones(block, block, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & square.tril()
    # A padded query sees at least itself: an empty row would be NaN, this one is dropped later.
    visible = visible | torch.eye(block, dtype=torch.bool, device=q.device)
    scores = (q @ k.transpose(-2, -1) / math.sqrt(block)).masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ v).flatten(2, 3)[..., :length, :]


def lln(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor,
    *,
    alpha: Tensor,
    beta: Tensor,
    mix: tuple[Tensor | float, Tensor | float] | None,
    causal: bool,
) -> Tensor:
    """Output (B, H, N, D); see `kernels.lln.api.lln`. Padded q, k, v must be zero."""
    alpha, beta = alpha.to(q.dtype), beta.to(q.dtype)
    out = read_causal(q, k, v, real, alpha, beta) if causal else read(q, *summarise(k, v, real, beta), alpha)
    if mix is None:
        return out
    weight_lln, weight_diag = (w.to(q.dtype) if isinstance(w, Tensor) else w for w in mix)
    return weight_lln * out + weight_diag * block_softmax(q, k, v, real, causal)
