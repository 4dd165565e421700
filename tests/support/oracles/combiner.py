"""Combiner by brute force: for every query the sets of its partition, for every set the formulas of the paper.

Positions count from 0 here; the paper's i is i + 1. Slow on purpose; shares nothing with the reference.
"""

import torch
from torch import Tensor

Partition = tuple[list[int], list[list[int]]]
"""The direct set and the regions of one query."""


def attention_matrix(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None = None,
    *,
    pattern: str,
    segment_length: int = 64,
    include_own_span: bool = False,
    causal: bool = False,
) -> Tensor:
    """The dense (B, H, N, N) matrix A with out = A v; zero rows for padded queries, zero columns for padded keys."""
    batch, heads, length, _ = q.shape
    matrices = []
    for b in range(batch):
        real = [j for j in range(length) if key_mask is None or key_mask[b, j]]
        known: dict = {}
        rows = []
        for i in range(length):
            if i not in real:
                rows.append(q.new_zeros(heads, length))
                continue
            direct, regions = partition(i, length, pattern, segment_length, include_own_span, causal)
            direct = [j for j in direct if j in real]
            regions = [[j for j in region if j in real] for region in regions]
            regions = [region for region in regions if region]
            rows.append(_row(q[b], k[b], i, direct, regions, pattern, segment_length, real, known))
        matrices.append(torch.stack(rows, 1))
    return torch.stack(matrices)


def partition(i: int, length: int, pattern: str, s: int, include_own_span: bool, causal: bool) -> Partition:
    """Ω⁰ and the regions of query i, before padding is taken out."""
    if pattern == "logsparse":
        return _logsparse_partition(i, length, causal)
    support = list(range(i + 1 if causal else length))
    own_row = [j for j in support if j // s == i // s]
    own_column = [j for j in support if j % s == i % s]
    spans = sorted({j // s for j in support})
    if pattern in ("fixed", "axial"):
        regions = [[j for j in support if j // s == r] for r in spans if include_own_span or r != i // s]
        return own_row, regions
    direct = sorted({*own_row, *own_column})
    if pattern == "axial_vertical":
        return direct, [[j for j in support if j % s == c and j not in direct] for c in range(s)]
    if pattern == "axial_horizontal":
        return direct, [[j for j in support if j // s == r and j not in direct] for r in spans]
    raise ValueError(pattern)


def _logsparse_partition(i: int, length: int, causal: bool) -> Partition:
    """Suffix sums of the bits of i cut the prefix; their mirror image in the next power of two cuts the suffix."""
    regions = _binary_spans(i)
    if not causal:
        size = 1
        while size < length:
            size *= 2
        mirrored = _binary_spans(size - 1 - i)
        regions += [[size - 1 - j for j in region if size - 1 - j < length] for region in mirrored]
    return [i], regions


def _binary_spans(n: int) -> list[list[int]]:
    """[0, n) cut at the partial sums of the binary expansion of n, highest bit first: 13 = 8 + 4 + 1."""
    spans, start = [], 0
    for bit in reversed(range(n.bit_length())):
        if n >> bit & 1:
            spans.append(list(range(start, start + 2**bit)))
            start += 2**bit
    return spans


def _row(
    q: Tensor,
    k: Tensor,
    i: int,
    direct: list[int],
    regions: list[list[int]],
    pattern: str,
    s: int,
    real: list[int],
    known: dict,
) -> Tensor:
    """Row i of the attention matrix, (H, N), from its partition; q and k are (H, N, D)."""
    heads, length, dim = q.shape
    summaries = []
    for region in regions:
        column = i % s if pattern == "axial" else None
        if (tuple(region), column) not in known:
            if column is None:
                known[tuple(region), column] = _pooled_summary(q, k, region)
            else:
                known[tuple(region), column] = _row_summary(q, k, region, region[0] // s * s + column, real)
        summaries.append(known[tuple(region), column])

    keys = torch.stack([k[:, j] for j in direct] + [key for key, _ in summaries], 1)  # (H, |direct| + regions, D)
    logits = (q[:, i, None] * keys).sum(-1) / dim**0.5
    weights = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)  # (H, direct tokens + regions)
    row = q.new_zeros(heads, length).index_add(1, torch.tensor(direct), weights[:, : len(direct)])
    for r, (region, (_, within)) in enumerate(zip(regions, summaries, strict=True)):
        row = row.index_add(1, torch.tensor(region), weights[:, len(direct) + r, None] * within)
    return row


def _pooled_summary(q: Tensor, k: Tensor, region: list[int]) -> tuple[Tensor, Tensor]:
    """k̂ (H, D) and p(j | region) (H, |region|), by max-pooled query and key."""
    return k[:, region].amax(1), _softmax(q[:, region].amax(1), k, region)


def _row_summary(q: Tensor, k: Tensor, region: list[int], asking: int, real: list[int]) -> tuple[Tensor, Tensor]:
    """k̂ and p(j | row) of Axial row-major: the token at `asking` asks, or the pooled query where it is padding."""
    query = q[:, asking] if asking in real else q[:, region].amax(1)
    within = _softmax(query, k, region)
    return (within[..., None] * k[:, region]).sum(1), within


def _softmax(query: Tensor, k: Tensor, region: list[int]) -> Tensor:
    """softmax_j(query·k_j / √D) over the tokens of a region, (H, |region|)."""
    logits = (query[:, None] * k[:, region]).sum(-1) / query.shape[-1] ** 0.5
    weights = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)
