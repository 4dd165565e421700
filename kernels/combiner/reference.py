"""Combiner attention in plain PyTorch (Ren et al., arXiv 2107.05768, sections 3 and 4).

The tokens that query i may see are partitioned into a direct set Ω⁰ and regions Ω¹ … Ωⁿ. A region counts as one
more key k̂_r with value h_r, and everything shares one normaliser (eq. 7 and 9), with τ = 1/√D:

    out_i = [ Σ_{j ∈ Ω⁰} exp(τ q_i·k_j) v_j + Σ_r exp(τ q_i·k̂_r) h_r ] / [ the same without v and h ]
    k̂_r = max_{j ∈ Ωʳ} k_j,   q̂_r = max_{j ∈ Ωʳ} q_j,   h_r = Σ_{j ∈ Ωʳ} softmax_j(τ q̂_r·k_j) v_j

Every row of the attention matrix sums to one, and no token of a query's support is left out or counted twice.

Padding (the paper has none): a padded token belongs to no set, maxima run over real tokens only, and a region
without any real token does not exist. So padding at the end never changes a result, whatever its length.
The gradient of a maximum is shared among its ties.

Below, s is the segment length; a grid is the sequence in rows of s columns; τ is already inside q.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.common.layout import compute_dtype
from kernels.common.masks import masked_softmax


def combiner(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    *,
    pattern: str,
    segment_length: int,
    include_own_span: bool,
    causal: bool,
) -> Tensor:
    """Combiner attention with one of the patterns of this file; shapes as in `kernels.combiner.api`.

    Returns (B, H, N, D) in the compute dtype; rows of padded queries hold anything finite.
    """
    batch, _, length, dim = q.shape
    dtype = compute_dtype(q.dtype)
    real = q.new_ones(batch, length, dtype=torch.bool) if key_mask is None else key_mask
    q, k, v = (x.to(dtype).masked_fill(~real[:, None, :, None], 0.0) for x in (q, k, v))
    q = q * dim**-0.5

    columns = min(segment_length, length)
    multiple = 1 << (length - 1).bit_length() if pattern == "logsparse" else columns
    extra = -length % multiple
    q, k, v = (pad(x, (0, 0, 0, extra)) for x in (q, k, v))
    real = pad(real, (0, extra))[:, None]  # (B, 1, N)
    if pattern == "logsparse":
        return logsparse(q, k, v, real, causal=causal)[:, :, :length]

    q, k, v, real = (x.unflatten(2, (-1, columns)) for x in (q, k, v, real))  # (B, H, G, s, D) and (B, 1, G, s)
    if pattern == "fixed":
        out = fixed(q, k, v, real, include_own_span=include_own_span, causal=causal)
    elif pattern == "axial":
        out = axial_rowmajor(q, k, v, real, include_own_span=include_own_span, causal=causal)
    elif pattern == "axial_vertical":
        out = axial_vertical(q, k, v, real, causal=causal)
    else:
        out = axial_horizontal(q, k, v, real, causal=causal)
    return out.flatten(2, 3)[:, :, :length]


def fixed(q: Tensor, k: Tensor, v: Tensor, real: Tensor, *, include_own_span: bool, causal: bool) -> Tensor:
    """Ω⁰ = the own span (causal: up to i); a region = every other span (causal: every earlier one). Section 4.1.

    q, k, v (B, H, G, s, D), real (B, 1, G, s). `include_own_span` adds the own span's summary to its direct tokens,
    as the released code does in its bidirectional form.
    """
    spans, size = q.shape[2:4]
    summary_key, summary_value, exists = summarise(q, k, v, real)  # (B, H, G, D) twice, (B, 1, G)

    own_logits = q @ k.mT  # (B, H, G, s, s)
    own_seen = real[..., None, :] & tokens_seen(size, causal, q.device)
    span_logits = (q.flatten(2, 3) @ summary_key.mT).unflatten(2, (spans, size))  # (B, H, G, s, G)
    span_seen = exists[:, :, None, None, :] & regions_seen(spans, causal, q.device, include_own_span)[:, None, :]

    p_own, p_span = joint_softmax([(own_logits, own_seen), (span_logits, span_seen)])
    return p_own @ v + (p_span.flatten(2, 3) @ summary_value).unflatten(2, (spans, size))


def logsparse(q: Tensor, k: Tensor, v: Tensor, real: Tensor, *, causal: bool) -> Tensor:
    """Ω⁰ = {i}; regions = the dyadic spans that the binary expansion of i names. Section 4.2.

    q, k, v (B, H, N, D), real (B, 1, N), N a power of two. At level l the sequence is cut into blocks of 2ˡ tokens.
    Where bit l of i is one, the block to the left of i's own is a region: together they are [0, i).
    Where it is zero, the block to the right is: together they are (i, N). So a causal query sees itself and its left
    siblings in the binary tree over the sequence, and a bidirectional one itself and all its siblings.
    The bidirectional form is ours (the paper's Appendix B is not known to us): the mirror image of the causal
    partition covers the suffix, on the same blocks, hence with the same summaries.
    """
    length = q.shape[2]
    groups = [((q * k).sum(-1, keepdim=True), real[..., None])]
    values = [v[:, :, :, None]]  # one (B, H, blocks, 1, D) a group, shared by the queries of a block
    for level in range(length.bit_length() - 1):
        q_block, k_block, v_block, real_block = (x.unflatten(2, (-1, 2**level)) for x in (q, k, v, real))
        key, value, exists = (
            x.unflatten(2, (-1, 2)).flip(3).flatten(2, 3)  # each block gets the summary of its sibling
            for x in summarise(q_block, k_block, v_block, real_block)
        )
        if causal:
            exists = exists & (torch.arange(exists.shape[2], device=q.device) % 2 == 1)
        groups.append(((q_block @ key[..., None]).flatten(2, 3), exists.repeat_interleave(2**level, 2)[..., None]))
        values.append(value[:, :, :, None])

    out = torch.zeros_like(v)
    for p, value in zip(joint_softmax(groups), values, strict=True):
        out = out + (p.unflatten(2, (value.shape[2], -1)) * value).flatten(2, 3)
    return out


def axial_rowmajor(q: Tensor, k: Tensor, v: Tensor, real: Tensor, *, include_own_span: bool, causal: bool) -> Tensor:
    """Ω⁰ = the own row (causal: up to i); a region = every other row (causal: every earlier one). Section 4.3.

    q, k, v (B, H, R, C, D), real (B, 1, R, C). The regions are those of Fixed, but a row is summarised once a column,
    by the token that stands there, and a query sees the summaries of its own column:

        p = softmax_j(τ q[r, c]·k[r, j]),   k̂[r, c] = Σ_j p_j k[r, j],   h[r, c] = Σ_j p_j v[r, j]

    The paper says no more than that the abstraction depends on row and column. This is the parameter-free form of
    the released code in which the summary's key abstracts the row ("wsum"; its language models add projections).
    Where no real token stands, the row's max-pooled query asks instead, so that no row loses its tokens: ours.
    The bidirectional form is ours (the paper's Appendix C is not known to us): all other rows, not only earlier ones.
    """
    rows, columns = q.shape[2:4]
    asking = torch.where(real[..., None], q, max_pool(q, real)[..., None, :])
    p = masked_softmax(asking @ k.mT, real[..., None, :])  # (B, H, R, C, C)
    summary_key, summary_value = p @ k, p @ v  # (B, H, R, C, D)

    row_logits = q @ k.mT  # (B, H, R, C, C)
    row_seen = real[..., None, :] & tokens_seen(columns, causal, q.device)
    summary_logits = swap(swap(q) @ swap(summary_key).mT)  # (B, H, R, C, R)
    others = regions_seen(rows, causal, q.device, include_own_span)
    summary_seen = real.any(-1)[:, :, None, None, :] & others[:, None, :]

    p_row, p_summary = joint_softmax([(row_logits, row_seen), (summary_logits, summary_seen)])
    return p_row @ v + swap(swap(p_summary) @ swap(summary_value))


def axial_vertical(q: Tensor, k: Tensor, v: Tensor, real: Tensor, *, causal: bool) -> Tensor:
    """Ω⁰ = own row and own column (causal: up to i); a region = what Ω⁰ leaves of another column. Section 4.3.

    q, k, v (B, H, R, C, D), real (B, 1, R, C). Causal: the part of the column above the query's row.
    Bidirectional: the column without the query's row; ours, the causal sets without their intersection with [0, i].
    """
    rows, columns = q.shape[2:4]
    other_rows = regions_seen(rows, causal, q.device)
    other_columns = regions_seen(columns, False, q.device)
    key, value, exists = (swap(x) for x in summarise_others(swap(q), swap(k), swap(v), swap(real), causal=causal))

    cross = cross_logits(q, k, real, other_rows, causal)
    p_row, p_column, p_summary = joint_softmax([*cross, (q @ key.mT, exists[..., None, :] & other_columns)])
    return p_row @ v + swap(swap(p_column) @ swap(v)) + p_summary @ value


def axial_horizontal(q: Tensor, k: Tensor, v: Tensor, real: Tensor, *, causal: bool) -> Tensor:
    """Ω⁰ = own row and own column (causal: up to i); a region = another row without the query's column. Section 4.3.

    q, k, v (B, H, R, C, D), real (B, 1, R, C). Causal: earlier rows. Bidirectional: all other rows; ours, as above.
    """
    rows = q.shape[2]
    other_rows = regions_seen(rows, causal, q.device)
    key, value, exists = summarise_others(q, k, v, real, causal=False)

    cross = cross_logits(q, k, real, other_rows, causal)
    summary_logits = swap(swap(q) @ swap(key).mT)  # (B, H, R, C, R)
    summary_seen = swap(swap(exists)[..., None, :] & other_rows)
    p_row, p_column, p_summary = joint_softmax([*cross, (summary_logits, summary_seen)])
    return p_row @ v + swap(swap(p_column) @ swap(v)) + swap(swap(p_summary) @ swap(value))


def cross_logits(q: Tensor, k: Tensor, real: Tensor, other_rows: Tensor, causal: bool) -> list[tuple[Tensor, Tensor]]:
    """Logits and visibility of the sparse axial set: the own row (B, H, R, C, C), the own column (B, H, R, C, R).

    The query itself is in the row, not in the column.
    """
    row_seen = real[..., None, :] & tokens_seen(q.shape[3], causal, q.device)
    column_seen = swap(swap(real)[..., None, :] & other_rows)
    return [(q @ k.mT, row_seen), (swap(swap(q) @ swap(k).mT), column_seen)]


def summarise(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k̂, h and existence of each region: its tokens are the second to last axis of q, k, v (…, n, D)."""
    logits = k @ max_pool(q, real)[..., None]  # (…, n, 1)
    p = masked_softmax(logits.squeeze(-1), real)
    return max_pool(k, real), (p[..., None, :] @ v).squeeze(-2), real.any(-1)


def summarise_others(q: Tensor, k: Tensor, v: Tensor, real: Tensor, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """k̂, h (…, n, D) and existence (…, n) of n regions a line: all its tokens but one (causal: all before it)."""
    members = real[..., None, :] & regions_seen(q.shape[-2], causal, q.device)  # (…, n, n)
    logits = max_pool_others(q, real, causal) @ k.mT
    return max_pool_others(k, real, causal), masked_softmax(logits, members) @ v, members.any(-1)


def max_pool(x: Tensor, real: Tensor) -> Tensor:
    """Maximum over the real tokens of the second to last axis, (…, n, D) to (…, D); zero where there is none."""
    highest = x.masked_fill(~real[..., None], -torch.inf).amax(-2)
    return highest.masked_fill(~real.any(-1)[..., None], 0.0)


def max_pool_others(x: Tensor, real: Tensor, causal: bool) -> Tensor:
    """For each of n tokens the maximum over the real others (causal: over those before it), (…, n, D); zero if none."""
    x = x.masked_fill(~real[..., None], -torch.inf)
    highest = maximum_before(x)
    if not causal:
        highest = torch.maximum(highest, maximum_before(x.flip(-2)).flip(-2))
    return highest.masked_fill(highest == -torch.inf, 0.0)


def maximum_before(x: Tensor) -> Tensor:
    """Running maximum along the second to last axis, the token itself excluded; -inf for the first.

    By doubling, in ⌈log₂ n⌉ steps over disjoint windows: unlike `cummax`, its gradient is deterministic on CUDA.
    """
    highest = pad(x[..., :-1, :], (0, 0, 1, 0), value=-torch.inf)
    step = 1
    while step < x.shape[-2]:
        highest = torch.maximum(highest, pad(highest[..., :-step, :], (0, 0, step, 0), value=-torch.inf))
        step *= 2
    return highest


def joint_softmax(groups: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Probabilities of several groups of (logits, visibility) under one normaliser, eq. 9.

    Only padded queries see nothing.
    """
    logits = torch.cat([logits for logits, _ in groups], -1)
    seen = torch.cat([seen.expand(logits.shape[0], 1, *logits.shape[2:]) for logits, seen in groups], -1)
    return masked_softmax(logits, seen).split([logits.shape[-1] for logits, _ in groups], -1)


def tokens_seen(size: int, causal: bool, device: torch.device) -> Tensor:
    """(size, size) bool: which tokens of its own span a query sees directly."""
    seen = torch.ones(size, size, dtype=torch.bool, device=device)
    return seen.tril() if causal else seen


def regions_seen(count: int, causal: bool, device: torch.device, include_own: bool = False) -> Tensor:
    """(count, count) bool: which others one of `count` spans, rows or columns sees; causal: earlier ones only."""
    seen = torch.ones(count, count, dtype=torch.bool, device=device)
    if causal:
        return seen.tril(-1)
    return seen if include_own else ~torch.eye(count, dtype=torch.bool, device=device)


def swap(grid: Tensor) -> Tensor:
    """Exchange rows and columns of a (B, H, R, C, …) grid."""
    return grid.transpose(2, 3)
