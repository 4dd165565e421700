"""MRA-2 from its definition: the pairs by sorting a list, the values by a dense N × N matrix, in float64."""

import math

import torch
from torch import Tensor


def block_pairs(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    *,
    block_size: int,
    blocks_per_row: int,
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
) -> Tensor:
    """Which pairs of blocks are refined, (B, H, nb, nb) bool.

    Pairs are ranked by: both blocks hold real tokens; number of priors met; τ q̄_x·k̄_y less the best of row x; index.
    """
    batch, heads, length, dim = q.shape
    num_blocks = math.ceil(length / block_size)
    chosen = torch.zeros(batch, heads, num_blocks, num_blocks, dtype=torch.bool)
    for b in range(batch):
        tokens = [
            [i for i in range(x * block_size, min(length, (x + 1) * block_size)) if key_mask is None or key_mask[b, i]]
            for x in range(num_blocks)
        ]
        occupied = [x for x in range(num_blocks) if tokens[x]]
        for h in range(heads):
            mean_q = {x: q[b, h, tokens[x]].detach().double().mean(0) for x in occupied}
            mean_k = {y: k[b, h, tokens[y]].detach().double().mean(0) for y in occupied}
            score = {(x, y): float(mean_q[x] @ mean_k[y]) / math.sqrt(dim) for x in occupied for y in occupied}

            def order(pair, score=score, occupied=occupied):
                x, y = pair
                if pair not in score:
                    return (1, 0, 0.0, x, y)
                priors = (x < first_blocks) + (y < first_blocks)
                priors += diagonal_blocks > 0 and abs(x - y) <= diagonal_blocks // 2
                return (0, -priors, max(score[x, other] for other in occupied) - score[pair], x, y)

            pairs = sorted(((x, y) for x in range(num_blocks) for y in range(num_blocks)), key=order)
            for x, y in pairs[: blocks_per_row * num_blocks]:
                chosen[b, h, x, y] = True
    return chosen


def mra_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, refined: Tensor, *, mode: str, block_size: int
) -> Tensor:
    """Normalised Â v, (B, H, N, D) float64, differentiable in q, k, v for the given pairs (B, H, nb, nb) bool.

    Â_ij = e^{τ q_i·k_j} where the pair of blocks of i and j is refined, else e^{τ q̄·k̄} of their blocks' means
    (mode "full") or 0 ("sparse"); columns of padded keys and rows of padded queries are zero.
    """
    batch, _, length, dim = q.shape
    real = torch.ones(batch, length, dtype=torch.bool) if key_mask is None else key_mask
    q, k, v = (x.double().masked_fill(~real[:, None, :, None], 0.0) for x in (q, k, v))
    block = torch.arange(length) // block_size
    # Row i averages over the real tokens in the block of i, so `average @ q` holds q̄ of each token's block.
    average = ((block[:, None] == block) & real[:, None, None, :]).double()  # (B, 1, N, N)
    average = average / average.sum(-1, keepdim=True).clamp(min=1)
    fine = q @ k.transpose(-1, -2) / math.sqrt(dim)
    coarse = (average @ q) @ (average @ k).transpose(-1, -2) / math.sqrt(dim)

    exact = refined[:, :, block][..., block]  # (B, H, N, N)
    seen = (real[:, None, :, None] & real[:, None, None, :]).expand_as(exact)
    if mode == "sparse":
        seen = seen & exact
    logits = torch.where(exact, fine, coarse).masked_fill(~seen, -torch.inf)
    blind = ~seen.any(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return weights @ v
