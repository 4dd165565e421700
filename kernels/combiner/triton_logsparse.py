"""Combiner-Logsparse in Triton, causal and bidirectional: every query sees the siblings of its ancestors in a tree.

A tile of T = 2ᵗ tokens is a subtree that one program holds in registers: the levels below t need no memory and no
matrix product, since a query sees one node a level. The tiles are the leaves of an upper tree (`triton_tree`), whose
k̂, h, q̂ lie in memory, O(N / T) of them:

forward   leaves (2 touches of one (B, H, N, D) tensor: q, k), pooling; shares (2: k, v), merging; queries (4)
backward  gradients of upper k̂ and h (3: q, out, do), merging; of upper q̂ (2: k, v), merging; everything else (7)
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.combiner.triton import LOG2E
from kernels.combiner.triton_tree import (
    Tree,
    ancestor,
    asking_gradients_kernel,
    leaves_kernel,
    merge_gradients_kernel,
    merge_shares_kernel,
    pool_kernel,
    shares_kernel,
    upper_gradients_kernel,
    upper_sibling,
)
from kernels.common.launch import arithmetic, block_dim, mask_arguments, state_dtype, strides
from kernels.common.tiles import NEVER, load_rows, place, real_rows, store_rows

TILE = 64
"""Tokens of a tile."""

WARPS = {16: 2, 32: 4, 64: 4, 128: 8}
"""By padded head dimension."""


@triton.jit
def expand(nodes, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gives every row what its node has, (BLOCK_N / SIZE, BLOCK_D) to (BLOCK_N, BLOCK_D)."""
    return tl.reshape(tl.broadcast_to(nodes[:, None, :], (BLOCK_N // SIZE, SIZE, BLOCK_D)), (BLOCK_N, BLOCK_D))


@triton.jit
def expand_scalar(nodes, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """`expand` of one number a node."""
    return tl.reshape(tl.broadcast_to(nodes[:, None], (BLOCK_N // SIZE, SIZE)), (BLOCK_N,))


@triton.jit
def total(x, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum of the rows of each node, (BLOCK_N, BLOCK_D) to (BLOCK_N / SIZE, BLOCK_D)."""
    return tl.sum(tl.reshape(x, (BLOCK_N // SIZE, SIZE, BLOCK_D)), axis=1)


@triton.jit
def sibling(nodes, COUNT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Exchanges the nodes of each pair; picking by sums with zeros is exact."""
    pairs = tl.reshape(nodes, (COUNT // 2, 2, BLOCK_D))
    first = (tl.arange(0, 2) == 0)[None, :, None]
    left, right = tl.sum(tl.where(first, pairs, 0.0), axis=1), tl.sum(tl.where(first, 0.0, pairs), axis=1)
    return tl.reshape(tl.where(first, right[:, None, :], left[:, None, :]), (COUNT, BLOCK_D))


@triton.jit
def pool_nodes(x, real, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):
    """Maximum over the real rows of each node, zero without any, and 1 / ties at the rows that hold it, else 0."""
    rows = tl.reshape(tl.where(real[:, None], x, float("-inf")), (BLOCK_N // SIZE, SIZE, BLOCK_D))
    highest = tl.max(rows, axis=1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    holds = tl.where(rows == highest[:, None, :], 1.0, 0.0).to(COMPUTE)
    holds = holds / tl.maximum(tl.sum(holds, axis=1), 1.0)[:, None, :]
    return highest, tl.reshape(holds, (BLOCK_N, BLOCK_D))


@triton.jit
def share_nodes(
    k, asking, real, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """Shares a_j of the rows in their node; zero at padding."""
    logits = tl.sum(k * expand(asking, SIZE, BLOCK_N, BLOCK_D), axis=1) * SCALE
    logits = tl.reshape(tl.where(real, logits, NEVER), (BLOCK_N // SIZE, SIZE))
    weights = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
    return tl.where(real, tl.reshape(weights / tl.sum(weights, axis=1)[:, None], (BLOCK_N,)), 0.0)


@triton.jit
def hidden_siblings(row, real, SIZE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr):
    """Bias of the sibling that each row sees: NEVER where it has no real token or, if CAUSAL, is to the right."""
    some = tl.max(tl.reshape(tl.where(real, 1.0, 0.0).to(COMPUTE), (BLOCK_N // (2 * SIZE), 2, SIZE)), axis=2)
    first = (tl.arange(0, 2) == 0)[None, :]
    left, right = tl.sum(tl.where(first, some, 0.0), axis=1), tl.sum(tl.where(first, 0.0, some), axis=1)
    some = tl.where(first, right[:, None], left[:, None])
    seen = expand_scalar(tl.reshape(some, (BLOCK_N // SIZE,)), SIZE, BLOCK_N) > 0
    if CAUSAL:
        seen = seen & ((row // SIZE) % 2 == 1)
    return tl.where(seen, 0.0, NEVER)


@triton.jit
def see_level(
    q, k, v, real, row, peak, mass, out,
    SIZE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The running softmax of every row after the siblings of SIZE tokens."""
    asking, _ = pool_nodes(q, real, SIZE, BLOCK_N, BLOCK_D, COMPUTE)
    key, _ = pool_nodes(k, real, SIZE, BLOCK_N, BLOCK_D, COMPUTE)
    share = share_nodes(k, asking, real, SIZE, BLOCK_N, BLOCK_D, SCALE)
    value = total(share[:, None] * v, SIZE, BLOCK_N, BLOCK_D)
    key = expand(sibling(key, BLOCK_N // SIZE, BLOCK_D), SIZE, BLOCK_N, BLOCK_D)
    value = expand(sibling(value, BLOCK_N // SIZE, BLOCK_D), SIZE, BLOCK_N, BLOCK_D)
    logits = tl.sum(q * key, axis=1) * SCALE + hidden_siblings(row, real, SIZE, CAUSAL, BLOCK_N, COMPUTE)
    return see(peak, mass, out, logits, value)


@triton.jit
def see(peak, mass, out, logits, value):
    """One more summary a row in the running softmax; `value` broadcasts to `out`."""
    higher = tl.maximum(peak, logits)
    weight, share = tl.exp2(logits - higher), tl.exp2(peak - higher)
    return higher, mass * share + weight, out * share[:, None] + weight[:, None] * value


@triton.jit
def level_gradients(
    q, k, v, grad, norm, delta, real, row,
    SIZE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """dq / τ, dk / τ and dv that the nodes of SIZE tokens pass on."""
    COUNT: tl.constexpr = BLOCK_N // SIZE
    asking, asking_holds = pool_nodes(q, real, SIZE, BLOCK_N, BLOCK_D, COMPUTE)
    key, key_holds = pool_nodes(k, real, SIZE, BLOCK_N, BLOCK_D, COMPUTE)
    share = share_nodes(k, asking, real, SIZE, BLOCK_N, BLOCK_D, SCALE)
    value = expand(sibling(total(share[:, None] * v, SIZE, BLOCK_N, BLOCK_D), COUNT, BLOCK_D), SIZE, BLOCK_N, BLOCK_D)
    key = expand(sibling(key, COUNT, BLOCK_D), SIZE, BLOCK_N, BLOCK_D)
    logits = tl.sum(q * key, axis=1) * SCALE + hidden_siblings(row, real, SIZE, CAUSAL, BLOCK_N, COMPUTE)
    weight = tl.exp2(logits - norm)
    grad_logits = weight * (tl.sum(grad * value, axis=1) - delta)
    grad_q = grad_logits[:, None] * key
    # What the siblings' queries pass to the node, at each of its rows.
    grad_value = sibling(total(weight[:, None] * grad, SIZE, BLOCK_N, BLOCK_D), COUNT, BLOCK_D)
    grad_key = sibling(total(grad_logits[:, None] * q, SIZE, BLOCK_N, BLOCK_D), COUNT, BLOCK_D)
    grad_value = expand(grad_value, SIZE, BLOCK_N, BLOCK_D)
    grad_k = key_holds * expand(grad_key, SIZE, BLOCK_N, BLOCK_D)
    grad_share = tl.sum(v * grad_value, axis=1)
    inner = tl.sum(tl.reshape(share * grad_share, (COUNT, SIZE)), axis=1)
    grad_share = share * (grad_share - expand_scalar(inner, SIZE, BLOCK_N))
    grad_k += grad_share[:, None] * expand(asking, SIZE, BLOCK_N, BLOCK_D)
    grad_asking = total(grad_share[:, None] * k, SIZE, BLOCK_N, BLOCK_D)
    grad_q += asking_holds * expand(grad_asking, SIZE, BLOCK_N, BLOCK_D)
    return grad_q, grad_k, share[:, None] * grad_value


@triton.jit
def queries_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    pooled_ptr, value_ptr, bias_ptr,  # k̂, h (B·H, 2P, D'), bias (B·H, 2P)
    out_ptr, out_b, out_h, out_n,
    norm_ptr,  # (B·H, N): log₂ of the normaliser
    length, num_heads, tiles, leaves, levels,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, LEVELS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Output of one tile."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h, head, start = h.to(tl.int64), b * num_heads + h, tile * BLOCK_N
    row, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, row, HAS_MASK)
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    peak, mass, out = tl.sum(q * k, axis=1) * SCALE, tl.full((BLOCK_N,), 1.0, COMPUTE), v  # the token itself
    for level in tl.static_range(LEVELS):
        peak, mass, out = see_level(
            q, k, v, real, row, peak, mass, out, 2**level, CAUSAL, BLOCK_N, BLOCK_D, SCALE, COMPUTE
        )
    base = head * 2 * leaves
    for e in range(levels):
        other, bias = upper_sibling((leaves + tile) >> e, bias_ptr + base, CAUSAL)
        key = tl.load(pooled_ptr + (base + other) * BLOCK_D + offset_d)
        value = tl.load(value_ptr + (base + other) * BLOCK_D + offset_d)
        logits = tl.sum(q * key[None, :], axis=1) * SCALE + bias
        peak, mass, out = see(peak, mass, out, logits, value[None, :])
    keep = start + row < length
    out = tl.where(real[:, None], out / mass[:, None], 0.0)
    store_rows(out_ptr + b * out_b + wide_h * out_h, out_n, start, row, keep, out, HEAD_DIM, BLOCK_D)
    norm = tl.where(real, peak + tl.log2(mass), -NEVER)
    tl.store(norm_ptr + head * length + start + row, norm, mask=keep)


@triton.jit
def tokens_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    pooled_ptr, value_ptr, bias_ptr, norm_ptr,  # q̂ and k̂ (2, B·H, 2P, D'), h (B·H, 2P, D'), (B·H, 2P)
    grad_asking_ptr, grad_key_ptr, grad_value_ptr,  # (B·H, 2P, D'), the first two shared among ties
    query_norm_ptr, delta_ptr,  # (B·H, N)
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    length, num_heads, tiles, leaves, levels, plane,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, LEVELS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one tile: the tokens themselves, its subtree, and the upper tree."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h, head, start = h.to(tl.int64), b * num_heads + h, tile * BLOCK_N
    row, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    TAU: tl.constexpr = HEAD_DIM**-0.5
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    real, keep = real_rows(mask_ptr + b * mask_b, mask_n, start, length, row, HAS_MASK), start + row < length
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    grad = load_rows(grad_ptr + b * grad_b + wide_h * grad_h, grad_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    norm = tl.load(query_norm_ptr + head * length + start + row, mask=keep, other=-NEVER)
    delta = tl.load(delta_ptr + head * length + start + row, mask=keep, other=0.0)

    weight = tl.exp2(tl.sum(q * k, axis=1) * SCALE - norm)
    grad_logits = weight * (tl.sum(grad * v, axis=1) - delta)
    grad_q, grad_k, grad_v = grad_logits[:, None] * k, grad_logits[:, None] * q, weight[:, None] * grad
    for level in tl.static_range(LEVELS):
        from_q, from_k, from_v = level_gradients(
            q, k, v, grad, norm, delta, real, row, 2**level, CAUSAL, BLOCK_N, BLOCK_D, SCALE, COMPUTE
        )
        grad_q += from_q
        grad_k += from_k
        grad_v += from_v
    base = head * 2 * leaves
    for e in range(levels):
        node = (leaves + tile) >> e
        other, bias = upper_sibling(node, bias_ptr + base, CAUSAL)
        key = tl.load(pooled_ptr + plane + (base + other) * BLOCK_D + offset_d)
        value = tl.load(value_ptr + (base + other) * BLOCK_D + offset_d)
        weight = tl.exp2(tl.sum(q * key[None, :], axis=1) * SCALE + bias - norm)
        grad_logits = weight * (tl.sum(grad * value[None, :], axis=1) - delta)
        grad_q += grad_logits[:, None] * key[None, :]
        asking, grad_value, share, grad_share = ancestor(
            k, v, real, base, node, pooled_ptr, value_ptr, norm_ptr, grad_value_ptr, BLOCK_D, SCALE
        )
        at = (base + node) * BLOCK_D + offset_d
        grad_v += share[:, None] * grad_value[None, :]
        grad_k += grad_share[:, None] * asking[None, :]
        highest = tl.load(pooled_ptr + plane + at)
        grad_k += tl.where(k == highest[None, :], tl.load(grad_key_ptr + at)[None, :], 0.0)
        grad_q += tl.where(q == asking[None, :], tl.load(grad_asking_ptr + at)[None, :], 0.0)
    grad_q = tl.where(real[:, None], grad_q * TAU, 0.0)
    grad_k = tl.where(real[:, None], grad_k * TAU, 0.0)
    store_rows(grad_q_ptr + b * gq_b + wide_h * gq_h, gq_n, start, row, keep, grad_q, HEAD_DIM, BLOCK_D)
    store_rows(grad_k_ptr + b * gk_b + wide_h * gk_h, gk_n, start, row, keep, grad_k, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr + b * gv_b + wide_h * gv_h, gv_n, start, row, keep, grad_v, HEAD_DIM, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ launches


def allocate(q: Tensor, span: int) -> list[Tensor]:
    """Output (B, H, N, D), laid out as (B, N, H, D), and what the backward pass reads of the call.

    norm (B·H, N), q̂ and k̂ and the rows that hold them (2, B·H, 2P, D'), h (B·H, 2P, D'), bias and norm (B·H, 2P)
    """
    batch, heads, length, dim = q.shape
    width, nodes, dtype = block_dim(dim), Tree.over(length, TILE).nodes, state_dtype(q.dtype)
    return [
        q.new_empty(batch, length, heads, dim).transpose(1, 2),
        q.new_empty(batch * heads, length, dtype=dtype),
        *(q.new_empty(2, batch * heads, nodes, width, dtype=dtype) for _ in range(2)),
        q.new_empty(batch * heads, nodes, width, dtype=dtype),
        *(q.new_empty(batch * heads, nodes, dtype=dtype) for _ in range(2)),
    ]


def _constants(q: Tensor, key_mask: Tensor | None) -> dict:
    width = block_dim(q.shape[-1])
    return dict(
        HAS_MASK=key_mask is not None, HEAD_DIM=q.shape[-1], BLOCK_N=TILE, BLOCK_D=width,
        COMPUTE=arithmetic(q.dtype)["COMPUTE"], num_warps=WARPS[width],
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, span: int, causal: bool, include_own: bool
) -> list[Tensor]:
    """What `allocate` names; `span` and `include_own` have no meaning here."""
    batch, heads, length, _ = q.shape
    out, norm, pooled, count, value, bias, value_norm = state = allocate(q, span)
    tree, sequences, flags = Tree.over(length, TILE), batch * heads, _constants(q, key_mask)
    tiles, leaves, levels, nodes = tree
    mask, width, plane = mask_arguments(key_mask, q), block_dim(q.shape[-1]), pooled.stride(0)
    if levels > 0:
        few = dict(BLOCK_D=width, COMPUTE=flags["COMPUTE"], num_warps=1)
        leaves_kernel[(sequences * leaves,)](
            q, *strides(q), k, *strides(k), *mask, pooled, count, bias, length, heads, leaves, plane, **flags
        )
        pool_kernel[(sequences * (leaves - 1), 2)](pooled, count, bias, leaves, levels, nodes, plane, **few)
        slots = value.new_empty(sequences, tiles, levels, width)
        peak, mass = (value.new_empty(sequences, tiles, levels) for _ in range(2))
        shares_kernel[(sequences * tiles,)](
            k, *strides(k), v, *strides(v), *mask, pooled, peak, mass, slots,
            length, heads, tiles, leaves, levels, **flags,
        )  # fmt: skip
        merge_shares_kernel[(sequences * (nodes - 2),)](
            peak, mass, slots, value, value_norm, tiles, leaves, levels, nodes, **few
        )
    queries_kernel[(sequences * tiles,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask, pooled[1], value, bias, out, *strides(out), norm,
        length, heads, tiles, leaves, levels, CAUSAL=causal, LEVELS=TILE.bit_length() - 1, **flags,
    )  # fmt: skip
    return state


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: list[Tensor],
    span: int, causal: bool, include_own: bool,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv in the layout of q, k, v."""
    batch, heads, length, _ = q.shape
    out, norm, pooled, count, value, bias, value_norm = state
    tree, sequences, flags = Tree.over(length, TILE), batch * heads, _constants(q, key_mask)
    tiles, leaves, levels, nodes = tree
    mask, width = mask_arguments(key_mask, q), block_dim(q.shape[-1])
    delta = torch.empty_like(norm)
    grad_asking, grad_key, grad_value = (torch.empty_like(value) for _ in range(3))
    from_queries, from_values = (value.new_empty(sequences, tiles, levels, width) for _ in range(2))
    upper_gradients_kernel[(sequences * tiles,)](
        q, *strides(q), out, *strides(out), grad, *strides(grad), *mask, pooled[1], value, bias, norm, delta,
        from_queries, from_values, length, heads, tiles, leaves, levels, CAUSAL=causal, **flags,
    )  # fmt: skip
    if levels > 0:
        few = dict(BLOCK_D=width, COMPUTE=flags["COMPUTE"], num_warps=1)
        sizes, grid = (tiles, leaves, levels, nodes), (sequences * (nodes - 2),)
        merge_gradients_kernel[grid](from_queries, count[1], grad_key, *sizes, SIBLING=True, SHARED=True, **few)
        merge_gradients_kernel[grid](from_values, count[1], grad_value, *sizes, SIBLING=True, SHARED=False, **few)
        asking_gradients_kernel[(sequences * tiles,)](
            k, *strides(k), v, *strides(v), *mask, pooled, value, value_norm, grad_value, from_queries,
            length, heads, tiles, leaves, levels, **flags,
        )  # fmt: skip
        merge_gradients_kernel[grid](from_queries, count[0], grad_asking, *sizes, SIBLING=False, SHARED=True, **few)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    grad_q, grad_k, grad_v = grads
    tokens_backward_kernel[(sequences * tiles,)](
        q, *strides(q), k, *strides(k), v, *strides(v), grad, *strides(grad), *mask,
        pooled, value, bias, value_norm, grad_asking, grad_key, grad_value, norm, delta,
        grad_q, *strides(grad_q), grad_k, *strides(grad_k), grad_v, *strides(grad_v),
        length, heads, tiles, leaves, levels, pooled.stride(0),
        CAUSAL=causal, LEVELS=TILE.bit_length() - 1, **flags,
    )  # fmt: skip
    return grads
