"""MRA-2 and MRA-2-s in plain PyTorch: select the block pairs to refine, then attend at two resolutions.

Notation: x, y are query and key blocks, nb = ⌈N / b⌉ their number, i, j tokens, c_y the real tokens of block y,
I the refined pairs. The method's formula stands in `kernels.mra.api`; its sums are shifted by their true maximum.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.common.layout import compute_dtype


def mra_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *, mode: str, block_size: int, blocks_per_row: int,
    first_blocks: int, diagonal_blocks: int, selection: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.mra.api.mra_attention` without its checks; (B, H, N, D) in the dtype it computes in."""
    if selection is None:
        priors = dict(first_blocks=first_blocks, diagonal_blocks=diagonal_blocks)
        selection = select_blocks(q, k, key_mask, block_size=block_size, blocks_per_row=blocks_per_row, **priors)
    return attend_blocks(q, k, v, key_mask, selection, mode=mode, block_size=block_size)


@torch.no_grad()
def select_blocks(
    q: Tensor, k: Tensor, key_mask: Tensor | None, *, block_size: int, blocks_per_row: int, first_blocks: int,
    diagonal_blocks: int,
) -> Tensor:  # fmt: skip
    """The block pairs I of every head, as flat indices x · nb + y, ascending: (B, H, m) int64.

    m = min(blocks_per_row · nb, nb²) pairs of the whole nb × nb matrix: first those with real tokens on both
    sides, among them the ones that most priors ask for, then the highest τ q̄_x·k̄_y − max_y' τ q̄_x·k̄_y', the
    maximum taken over blocks with real tokens; ties go to the lowest index. Priors: the rows x < first_blocks, the
    columns y < first_blocks, and the diagonals |x − y| <= diagonal_blocks // 2 (if diagonal_blocks > 0).
    The authors write this order as additions of 5e3 and −1e4 to the score.
    """
    priors, scores = rank_blocks(
        q, k, key_mask, block_size=block_size, first_blocks=first_blocks, diagonal_blocks=diagonal_blocks
    )
    # Two stable sorts order by prior, then score, then index; a sum of both would lose score digits to rounding.
    by_score = scores.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    by_prior = priors.flatten(-2).gather(-1, by_score).argsort(dim=-1, descending=True, stable=True)
    num_blocks = scores.shape[-1]
    budget = min(blocks_per_row * num_blocks, num_blocks**2)
    return by_score.gather(-1, by_prior)[..., :budget].sort(-1).values


@torch.no_grad()
def rank_blocks(
    q: Tensor, k: Tensor, key_mask: Tensor | None, *, block_size: int, first_blocks: int, diagonal_blocks: int
) -> tuple[Tensor, Tensor]:
    """What orders the pairs in `select_blocks`, (B, H, nb, nb) each.

    First the priors that ask for a pair, −1 where a side has no real token, then its score less the best of its row.
    """
    real = _real_tokens(q, key_mask, block_size)  # (B or 1, 1, nb, b)
    counts = real.sum(-1)
    num_blocks = counts.shape[-1]
    occupied = (counts > 0)[..., :, None] & (counts > 0)[..., None, :]  # (B or 1, 1, nb, nb)
    scores = _scaled_products(_means(_blocks(q, real), counts), _means(_blocks(k, real), counts))
    scores = scores.masked_fill(~occupied, -torch.inf)
    scores = (scores - scores.amax(-1, keepdim=True)).masked_fill(~occupied, 0.0)

    block = torch.arange(num_blocks, device=q.device)
    first = (block < first_blocks).long()
    priors = first[:, None] + first
    if diagonal_blocks > 0:
        priors = priors + ((block[:, None] - block).abs() <= diagonal_blocks // 2).long()
    return priors.where(occupied, -1).expand_as(scores), scores


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, selection: Tensor, *, mode: str, block_size: int
) -> Tensor:
    """Attention that is exact on the pairs of `selection` (of `select_blocks`); (B, H, N, D).

    The gradient takes `selection` as given; in mode "full" it also flows through the block means.
    A query that sees no real key (mode "sparse", no refined block in its row) gives zeros.
    """
    real = _real_tokens(q, key_mask, block_size)  # (B or 1, 1, nb, b)
    counts = real.sum(-1)
    query, key, value = (_blocks(x, real) for x in (q, k, v))  # (B, H, nb, b, D)
    num_blocks = counts.shape[-1]
    rows, columns = selection // num_blocks, selection % num_blocks  # (B, H, m)
    # One-hot products gather and scatter blocks: unlike indexing, their gradients add up in a fixed order on CUDA.
    in_row, in_column = (_one_hot(index, num_blocks, query.dtype) for index in (rows, columns))  # (B, H, m, nb)

    real_keys = real.expand(*rows.shape[:2], -1, -1).gather(2, _over_tokens(columns, block_size))  # (B, H, m, b)
    logits = _scaled_products(_pick(query, in_row), _pick(key, in_column))  # (B, H, m, b, b)
    logits = logits.masked_fill(~real_keys[..., None, :], -torch.inf)
    peak = _maximum_by_row(logits, rows, num_blocks)  # (B, H, nb, b)

    coarse = _coarse_scores(query, key, counts, selection) if mode == "full" else None  # (B, H, nb, nb)
    if coarse is not None:
        peak = torch.maximum(peak, coarse.detach().amax(-1, keepdim=True))
    peak = peak.masked_fill(peak.isinf(), 0.0)  # a query without any key: −inf − (−inf) would be NaN

    # Weights are normalised before they meet v: where one key takes all, its gradient then cancels exactly.
    weights = torch.exp(logits - peak.gather(2, _over_tokens(rows, block_size))[..., None])
    total = _add_by_row(weights.sum(-1, keepdim=True), in_row)  # (B, H, nb, b, 1)
    coarse_weights = None
    if coarse is not None:
        coarse_weights = counts[..., None, None, :] * torch.exp(coarse[..., None, :] - peak[..., None])
        total = total + coarse_weights.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)
    out = _add_by_row(weights / _pick(total, in_row) @ _pick(value, in_column), in_row)  # (B, H, nb, b, D)
    if coarse_weights is not None:
        out = out + ((coarse_weights / total).flatten(2, 3) @ _means(value, counts)).view_as(out)
    return out.flatten(2, 3)[:, :, : q.shape[2]]


def _real_tokens(q: Tensor, key_mask: Tensor | None, block_size: int) -> Tensor:
    """Which tokens are real, in blocks, the last one filled up: (B or 1, 1, nb, b) bool."""
    length = q.shape[2]
    if key_mask is None:
        key_mask = torch.ones(1, length, dtype=torch.bool, device=q.device)
    return pad(key_mask, (0, -length % block_size)).unflatten(-1, (-1, block_size))[:, None]


def _blocks(x: Tensor, real: Tensor) -> Tensor:
    """(B, H, N, D) in blocks, (B, H, nb, b, D), zero where the token is not real."""
    block_size = real.shape[-1]
    x = pad(x.to(compute_dtype(x.dtype)), (0, 0, 0, -x.shape[2] % block_size))
    return x.unflatten(2, (-1, block_size)).masked_fill(~real[..., None], 0.0)


def _means(blocks: Tensor, counts: Tensor) -> Tensor:
    """Mean over the real tokens of each block, (B, H, nb, D); zero for a block without any."""
    return blocks.sum(-2) / counts.clamp(min=1)[..., None]


def _scaled_products(queries: Tensor, keys: Tensor) -> Tensor:
    """τ q·k for all pairs of the last but one dimension, τ = 1/√D."""
    return queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5


def _coarse_scores(query: Tensor, key: Tensor, counts: Tensor, selection: Tensor) -> Tensor:
    """τ q̄_x·k̄_y where key block y has real tokens and (x, y) is not refined, else −inf: (B, H, nb, nb)."""
    scores = _scaled_products(_means(query, counts), _means(key, counts))
    refined = torch.zeros_like(scores, dtype=torch.bool).flatten(-2).scatter(-1, selection, True).view_as(scores)
    return scores.masked_fill(refined | (counts == 0)[..., None, :], -torch.inf)


def _one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return (index[..., None] == torch.arange(size, device=index.device)).to(dtype)


def _over_tokens(index: Tensor, block_size: int) -> Tensor:
    """A block index repeated for each token of the block."""
    return index[..., None].expand(*index.shape, block_size)


def _pick(blocks: Tensor, one_hot: Tensor) -> Tensor:
    """The block that each refined pair asks for: (B, H, nb, b, D), (B, H, m, nb) → (B, H, m, b, D)."""
    return (one_hot @ blocks.flatten(-2)).unflatten(-1, blocks.shape[-2:])


def _add_by_row(tiles: Tensor, in_row: Tensor) -> Tensor:
    """Sum of the tiles of each query block: (B, H, m, b, D), (B, H, m, nb) → (B, H, nb, b, D)."""
    return (in_row.transpose(-1, -2) @ tiles.flatten(-2)).unflatten(-1, tiles.shape[-2:])


def _maximum_by_row(logits: Tensor, rows: Tensor, num_blocks: int) -> Tensor:
    """Largest logit of each query over its refined blocks, −inf without any: (B, H, nb, b), no gradient."""
    maxima = logits.detach().amax(-1)  # (B, H, m, b)
    batch, heads, _, block_size = maxima.shape
    lowest = maxima.new_full((batch, heads, num_blocks, block_size), -torch.inf)
    return lowest.scatter_reduce(2, _over_tokens(rows, block_size), maxima, "amax")
