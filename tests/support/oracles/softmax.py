"""Dense softmax attention from its definition, in float64."""

import torch
from torch import Tensor


def softmax_weights(q: Tensor, k: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """A_ij = e^{q_i·k_j/√D} / Σ_j' e^{q_i·k_j'/√D} over the keys that i may see, float64 (B, H, N, N).

    Query i sees the real keys (`key_mask` (B, N), True = real), with `causal` only those at j <= i.
    Rows of padded queries are zero; so is a row that sees no key.
    """
    batch, _, length, dim = q.shape
    real = torch.ones(batch, length, dtype=torch.bool) if key_mask is None else key_mask
    visible = real[:, None, :, None] & real[:, None, None, :]  # (B, 1, N, N)
    if causal:
        visible = visible & torch.ones(length, length, dtype=torch.bool).tril()
    logits = (q.double() @ k.double().transpose(-1, -2) / dim**0.5).masked_fill(~visible, -torch.inf)
    blind = ~visible.any(-1, keepdim=True)  # queries without any key: −inf − (−inf) and 0 / 0 would be NaN
    numerators = torch.exp(logits - logits.amax(-1, keepdim=True).detach().masked_fill(blind, 0.0))
    return numerators / numerators.sum(-1, keepdim=True).masked_fill(blind, 1.0)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """o_i = Σ_j A_ij v_j, float64 (B, H, N, D), with A of `softmax_weights`; differentiable in q, k, v."""
    if key_mask is not None:
        v = v.masked_fill(~key_mask[:, None, :, None], 0.0)  # 0 · whatever padding holds must be 0
    return softmax_weights(q, k, key_mask, causal) @ v.double()
