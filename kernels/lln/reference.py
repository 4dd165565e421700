"""LLN attention in plain PyTorch: the form that needs neither an eps nor a lucky range of inputs.

The kernel Σ_l exp(α q_il + β k_jl), normalised over j, is a softmax over features after a softmax over tokens:

    λ_l  = logsumexp_j β k_jl                   log-mass of feature l
    C_l  = Σ_j softmax_j(β k_jl) v_j            context of feature l, a convex combination of values
    o_i  = Σ_l softmax_l(α q_il + λ_l) C_l

exactly, so that everything that is exponentiated is at most zero.
"""

import torch
from torch import Tensor

NEVER = -1e30
"""Logit of a padded key: far below every real one, yet finite, so that no −inf − (−inf) can become NaN."""


def summarise(k: Tensor, v: Tensor, real: Tensor, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    """Context C (B, H, D, D) and log-mass λ (B, H, D) of the real keys; padded v must be zero.

    Without any real key C is zero and λ is about NEVER.
    """
    logits = (beta * k).masked_fill(~real[:, None, :, None], NEVER)  # (B, H, N, D)
    return logits.softmax(-2).transpose(-2, -1) @ v, logits.logsumexp(-2)


def read(q: Tensor, context: Tensor, log_mass: Tensor, alpha: Tensor | float) -> Tensor:
    """What the queries (B, H, N, D) read from the summary of the keys: softmax_l(α q + λ) C."""
    return torch.softmax(alpha * q + log_mass.unsqueeze(-2), dim=-1) @ context
