"""AdaMRA-R from its definition: window by window, query by query, float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def windows(x: Tensor, positions: list[int], rate: int, weight: Tensor | None) -> Tensor:
    """The fused windows (M, D) of one head's tokens x (N, D) at the real `positions`; empty windows are left out."""
    fused = []
    for first in range(0, len(x), rate):
        inside = [j for j in positions if first <= j < first + rate]
        if not inside:
            continue
        total = torch.zeros_like(x[0])
        for j in inside:
            w = None if weight is None else weight[j - first]
            total = total + (x[j] / rate if w is None else w * x[j] if w.dim() == 1 else x[j] @ w)
        fused.append(total * rate / len(inside))
    return torch.stack(fused)


def read(q: Tensor, keys: Tensor, values: Tensor, feature_map: str, alpha: Tensor, beta: Tensor) -> Tensor:
    """y of one query (D,) over the windows of one resolution."""
    if feature_map == "exponential":
        kernel = torch.exp(beta * keys) @ torch.exp(alpha * q)
        return kernel @ values / kernel.sum()
    if feature_map == "elu":

        def phi(x: Tensor) -> Tensor:
            return torch.where(x > 0, x + 1, torch.exp(x))

        kernel = phi(keys) @ phi(q)
        return kernel @ values / (kernel.sum() + 1e-6)
    query = torch.exp(q) / torch.exp(q).sum()
    weights = torch.exp(keys) / torch.exp(keys).sum(0)  # each feature over the windows
    return (weights @ query) @ values


def choice(logits: list[float]) -> int:
    """The first of the highest logits."""
    return logits.index(max(logits))


def spreads(
    q: Tensor, k: Tensor, key_mask: Tensor, rates: Sequence[int], weights: Sequence[Tensor | None]
) -> tuple[float, list[float]]:
    """σ of all real query entries, and of all fused key entries of each resolution."""
    tokens = [mask.nonzero().squeeze(-1).tolist() for mask in key_mask]
    entries = torch.cat([q[b, :, tokens[b]].flatten() for b in range(len(q))])
    sigma_keys = []
    for rate, weight in zip(rates, weights, strict=True):
        fused = [
            windows(k[b, h], tokens[b], rate, None if weight is None else weight[h]).flatten()
            for b in range(k.shape[0])
            for h in range(k.shape[1])
            if tokens[b]
        ]
        sigma_keys.append(torch.cat(fused).std().item())
    return entries.std().item(), sigma_keys


def adamra(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor,
    *,
    router: Tensor | None,
    rates: Sequence[int],
    key_weights: Sequence[Tensor | None],
    value_weights: Sequence[Tensor | None],
    scales: tuple[Tensor, Tensor],
    feature_map: str,
    gate: str,
) -> tuple[Tensor, Tensor, dict[tuple[int, int, int], int]]:
    """Output (B, H, N, D), balance loss, and the resolution of every real query (b, h, i)."""
    batch, heads, length, _ = q.shape
    resolutions = len(rates)
    out = [[[torch.zeros_like(q[b, h, i]) for i in range(length)] for h in range(heads)] for b in range(batch)]
    probabilities: list[list[Tensor]] = [[] for _ in range(heads)]
    chosen: dict[tuple[int, int, int], int] = {}
    for b in range(batch):
        positions = key_mask[b].nonzero().squeeze(-1).tolist()
        if not positions:
            continue
        for h in range(heads):
            keys, values = (
                [windows(x[b, h], positions, rates[r], None if w[r] is None else w[r][h]) for r in range(resolutions)]
                for x, w in ((k, key_weights), (v, value_weights))
            )
            for i in positions:
                y = [
                    read(q[b, h, i], keys[r], values[r], feature_map, scales[0][r], scales[1][r])
                    for r in range(resolutions)
                ]
                if router is None:
                    out[b][h][i] = y[h % resolutions]
                    continue
                logits = router[h] @ q[b, h, i]
                p = torch.exp(logits) / torch.exp(logits).sum()
                r = chosen[b, h, i] = choice(logits.tolist())
                probabilities[h].append(p)
                if gate == "soft":
                    out[b][h][i] = torch.stack([p[s] * y[s] for s in range(resolutions)]).sum(0)
                else:
                    out[b][h][i] = p[r] * y[r] if gate == "top1" else y[r]

    balance = q.new_zeros(())
    if chosen:
        for h in range(heads):
            picks = [r for (_, head, _), r in chosen.items() if head == h]
            for r in range(resolutions):
                share = picks.count(r) / len(picks)
                balance = balance + resolutions * share * torch.stack(probabilities[h])[:, r].mean() / heads
    return torch.stack([torch.stack([torch.stack(rows) for rows in head]) for head in out]), balance, chosen
