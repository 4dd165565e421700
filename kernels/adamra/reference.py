"""AdaMRA-R in plain PyTorch: compress keys and values, let each query read one resolution."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import elu, pad

from kernels.lln.moments import spread
from kernels.lln.reference import read, summarise

EPS = 1e-6
"""Added to the normaliser of the elu map, which can underflow; the other maps need none."""


def compress(x: Tensor, real: Tensor, rate: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fuse windows of `rate` tokens: x'_m = rate / |valid_m| · Σ_t w_t x_{m·rate + t}, over valid tokens.

    x        (B, H, N, D), zero where `real` (B, N) is False
    weight   None: the mean of the valid tokens | (H, rate, D): one weight a channel | (H, rate, D, D): a full map
    return   (B, H, M, D) and the windows that hold a real token, (B, M); M = ⌈N / rate⌉

    The factor rate / |valid| keeps partly filled windows at full strength; weights of 1 / rate are the mean.
    """
    filler = -x.shape[2] % rate
    windows = pad(x, (0, 0, 0, filler)).unflatten(2, (-1, rate))  # (B, H, M, rate, D)
    valid = pad(real, (0, filler)).unflatten(1, (-1, rate)).sum(-1)  # (B, M)
    if weight is None:
        fused = windows.sum(-2) / rate
    elif weight.dim() == 3:
        fused = torch.einsum("bhmtd,htd->bhmd", windows, weight.to(x.dtype))
    else:
        fused = torch.einsum("bhmtd,htde->bhme", windows, weight.to(x.dtype))
    return fused * (rate / valid.clamp(min=1).to(x.dtype))[:, None, :, None], valid > 0


def spreads(
    q: Tensor, k: Tensor, real: Tensor, rates: Sequence[int], weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """σ of the real queries and of the compressed keys, over windows with a real token; each (R,)."""
    compressed = [compress(k, real, rate, weight) for rate, weight in zip(rates, weights, strict=True)]
    return spread(q, real).expand(len(rates)), torch.stack([spread(keys, kept) for keys, kept in compressed])


def route(q: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """Routing probabilities p_i = softmax(W q_i), and the chosen resolution as one-hot, both (B, H, N, R).

    router   (H, R, D); equal logits choose the lowest index
    """
    logits = torch.einsum("bhnd,hrd->bhnr", q, router.to(q.dtype))
    highest = logits.detach() == logits.detach().amax(-1, keepdim=True)
    return logits.softmax(-1), highest & (highest.cumsum(-1) == 1)


def mixing_weights(gate: str, probability: Tensor, chosen: Tensor) -> Tensor:
    """Weight of each resolution in a query's output, (B, H, N, R)."""
    if gate == "soft":
        return probability
    if gate == "top1":
        return probability * chosen
    return chosen.to(probability.dtype)


def balance_loss(probability: Tensor, chosen: Tensor, real: Tensor) -> Tensor:
    """R Σ_r f_r P_r of each head's router, averaged over heads; 1 when all resolutions are used alike.

    f_r is the share of real queries that chose r, P_r the mean probability of r over them (Switch Transformer).
    """
    padded, count = ~real[:, None, :, None], real.sum().clamp(min=1).to(probability.dtype)
    share = chosen.masked_fill(padded, False).sum((0, 2)) / count  # f, (H, R)
    mean = probability.masked_fill(padded, 0.0).sum((0, 2)) / count  # P, (H, R)
    return probability.shape[-1] * (share * mean).sum(-1).mean()


def read_windows(
    q: Tensor, keys: Tensor, values: Tensor, kept: Tensor, feature_map: str, alpha: Tensor | float, beta: Tensor | float
) -> Tensor:
    """Linear attention of all queries over the windows of one resolution, (B, H, N, D)."""
    if feature_map == "elu":
        features = (elu(keys) + 1).masked_fill(~kept[:, None, :, None], 0.0)  # φ(k'), (B, H, M, D)
        queries = elu(q) + 1
        normaliser = queries @ features.sum(-2).unsqueeze(-1) + EPS  # (B, H, N, 1)
        return queries @ (features.transpose(-2, -1) @ values) / normaliser
    if feature_map == "softmax":
        context, _ = summarise(keys, values, kept, 1.0)
        return q.softmax(-1) @ context
    return read(q, *summarise(keys, values, kept, beta), alpha)


def adamra(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor,
    *,
    router: Tensor | None,
    rates: Sequence[int],
    key_weights: Sequence[Tensor | None],
    value_weights: Sequence[Tensor | None],
    scales: tuple[Tensor, Tensor] | None,
    feature_map: str,
    gate: str,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, D) and balance loss; see `kernels.adamra.api.adamra`. Padded q, k, v must be zero."""
    if router is None:  # head h is fixed to resolution h mod R
        heads = torch.arange(q.shape[1], device=q.device) % len(rates)
        mixing = (heads[:, None] == torch.arange(len(rates), device=q.device)).to(q.dtype)[None, :, None, :]
        balance = q.new_zeros(())
    else:
        probability, chosen = route(q, router)
        mixing = mixing_weights(gate, probability, chosen)
        balance = balance_loss(probability, chosen, real)
    # Every resolution is computed densely and then selected: the reads are cheaper than a gather of queries.
    out = torch.zeros_like(q)
    for r, rate in enumerate(rates):
        keys, kept = compress(k, real, rate, key_weights[r])
        values, _ = compress(v, real, rate, value_weights[r])
        alpha, beta = (1.0, 1.0) if scales is None else (scales[0][r].to(q.dtype), scales[1][r].to(q.dtype))
        out = out + mixing[..., r : r + 1] * read_windows(q, keys, values, kept, feature_map, alpha, beta)
    return out, balance
