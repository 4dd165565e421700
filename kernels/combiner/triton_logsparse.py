"""Combiner-Logsparse in Triton, causal and bidirectional: every query sees the siblings of its ancestors in a tree.

A tile of T = 2ᵗ tokens is a subtree of T − 1 nodes, in the order of their middles: node u > 0 with l − 1 zeros at its
end is on level l and stands for the tokens i with i >> l = u >> l, its span there. With T tokens and, 0 being none, T
nodes, all of it is dense matrix products, of which a mask keeps what belongs together. q̂ and k̂ of these nodes would
take as much room as q and k: who needs them makes them anew from q and k, which are at hand. The tiles are the leaves
of an upper tree (`triton_tree`), whose k̂, h, q̂ lie in memory, O(N / T) of them:

forward   leaves (2 touches of one (B, H, N, D) tensor: q, k), pooling; shares (2: k, v), merging; queries (4: q, k, v,
          out)
backward  gradients of upper k̂ and h (3: q, out, do), merging; of upper q̂ (2: k, v), merging; everything else (7: q, k,
          v, do, dq, dk, dv)
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.combiner.triton_tree import (
    Tree,
    asking_gradients_kernel,
    leaves_kernel,
    merge_gradients_kernel,
    merge_shares_kernel,
    path,
    pool_kernel,
    shares_kernel,
    siblings,
    upper_gradients_kernel,
    upper_shares,
)
from kernels.common.launch import COUNTS, arithmetic, block_dim, mask_arguments, state_dtype, strides
from kernels.common.tiles import LOG2E, NEVER, load_rows, place, product, real_rows, store_rows, widened

TILE = 64
"""Tokens of a tile of bfloat16; others take half as many, since they multiply as float32."""

WARPS = {16: 4, 32: 4, 64: 8, 128: 8}
"""By padded head dimension."""

REGISTERS = 168
"""Most of a thread of four warps in the forward pass over queries: so three programs run side by side, not two."""


@triton.jit
def places_of(node, LEVELS: tl.constexpr):
    """How many levels each node of a subtree is above the tokens, and its span there; 0 is no node and has span −1."""
    level = tl.zeros_like(node) + 1
    for below in tl.static_range(1, LEVELS):
        level += (node % (1 << below) == 0).to(tl.int32)
    return level, tl.where(node > 0, node >> level, -1)


@triton.jit
def ancestors(level, BLOCK_N: tl.constexpr):
    """Span of each token on the level of each node, (nodes, tokens)."""
    return tl.arange(0, BLOCK_N)[None, :] >> level[:, None]


@triton.jit
def maxima(x, real, level, LEVELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):
    """Maximum over the real rows of each node, zero without any, (T, D')."""
    highest = tl.where(real[:, None], x.to(COMPUTE), float("-inf"))
    pooled = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for up in tl.static_range(1, LEVELS + 1):
        highest = tl.max(tl.reshape(highest, (BLOCK_N >> up, 2, BLOCK_D)), axis=1)
        wide = tl.broadcast_to(highest[:, None, :], (BLOCK_N >> up, 1 << up, BLOCK_D))
        pooled = tl.where((level == up)[:, None], tl.reshape(wide, (BLOCK_N, BLOCK_D)), pooled)
    return tl.where(pooled == float("-inf"), 0.0, pooled).to(x.dtype)


@triton.jit
def share_nodes(
    asking, k, real, level, span, SCALE: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Shares a_uj of the tokens in the nodes above them, (nodes, tokens), and which nodes have a real token."""
    within = (ancestors(level, BLOCK_N) == span[:, None]) & real[None, :]
    logits = tl.where(within, product(asking, tl.trans(k), COMPUTE, OPERAND, PRECISION) * SCALE, NEVER)
    weights = tl.where(within, tl.exp2(logits - tl.max(logits, axis=1)[:, None]), 0.0)
    mass = tl.sum(weights, axis=1)
    return weights / tl.where(mass > 0, mass, 1.0)[:, None], mass > 0


@triton.jit
def sees_node(level, span, some, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which nodes are seen by which tokens, (nodes, tokens): siblings of their ancestors, if CAUSAL to the left."""
    seen = some & (span % 2 == 0) if CAUSAL else some
    return ((ancestors(level, BLOCK_N) ^ 1) == span[:, None]) & seen[:, None]


@triton.jit
def sees_token(real, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which tokens are seen by which as such, (keys, queries): the token itself and the other one of its pair."""
    key, query = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]
    seen = ((key ^ query) <= 1) & real[:, None]
    return seen & (key <= query) if CAUSAL else seen


@triton.jit(do_not_specialize_on_alignment=COUNTS)
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
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of one tile. Queries are the columns of what a mask keeps, so that one mask serves both passes."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h, head, start = h.to(tl.int64), b * num_heads + h, tile * BLOCK_N
    row, keep = tl.arange(0, BLOCK_N), start + tl.arange(0, BLOCK_N) < length
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, row, HAS_MASK)
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, row, real, HEAD_DIM, BLOCK_D)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, row, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, row, real, HEAD_DIM, BLOCK_D)
    level, span = places_of(row, LEVELS)
    asking = maxima(q, real, level, LEVELS, BLOCK_N, BLOCK_D, COMPUTE)
    key = maxima(k, real, level, LEVELS, BLOCK_N, BLOCK_D, COMPUTE)
    share, some = share_nodes(asking, k, real, level, span, SCALE, BLOCK_N, COMPUTE, OPERAND, PRECISION)
    value = product(share, v, COMPUTE, OPERAND, PRECISION)
    upper, bias = siblings(leaves + tile, levels, bias_ptr + head * 2 * leaves, CAUSAL, BLOCK_E)
    upper_key = path(pooled_ptr, head * 2 * leaves, upper, levels, BLOCK_E, BLOCK_D)
    upper_value = path(value_ptr, head * 2 * leaves, upper, levels, BLOCK_E, BLOCK_D)

    q = tl.trans(q)
    own = product(k, q, COMPUTE, OPERAND, PRECISION) * SCALE
    own = tl.where(sees_token(real, CAUSAL, BLOCK_N), own, NEVER)
    near = product(key, q, COMPUTE, OPERAND, PRECISION) * SCALE
    near = tl.where(sees_node(level, span, some, CAUSAL, BLOCK_N), near, NEVER)
    far = product(upper_key, q, COMPUTE, OPERAND, PRECISION) * SCALE + bias[:, None]
    peak = tl.maximum(tl.maximum(tl.max(own, axis=0), tl.max(near, axis=0)), tl.max(far, axis=0))
    own, near, far = tl.exp2(own - peak[None, :]), tl.exp2(near - peak[None, :]), tl.exp2(far - peak[None, :])
    mass = tl.sum(own, axis=0) + tl.sum(near, axis=0) + tl.sum(far, axis=0)
    out = product(tl.trans(own), v, COMPUTE, OPERAND, PRECISION)
    out += product(tl.trans(near), value, COMPUTE, OPERAND, PRECISION)
    out += product(tl.trans(far), upper_value, COMPUTE, OPERAND, PRECISION)
    out = tl.where(real[:, None], out / mass[:, None], 0.0)
    store_rows(out_ptr + b * out_b + wide_h * out_h, out_n, start, row, keep, out, HEAD_DIM, BLOCK_D)
    norm = tl.where(real, peak + tl.log2(mass), -NEVER)
    tl.store(norm_ptr + head * length + start + row, norm, mask=keep)


@triton.jit
def attention_gradients(
    key, value, q, grad, norm, delta, seen,
    SCALE: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq / τ, dk̂ / τ and dh of one tile of keys and values; `seen` (keys, queries)."""
    logits = product(key, tl.trans(q), COMPUTE, OPERAND, PRECISION) * SCALE
    weights = tl.exp2(tl.where(seen, logits, NEVER) - norm[None, :])
    grad_value = product(weights, grad, COMPUTE, OPERAND, PRECISION)
    grad_logits = weights * (product(value, tl.trans(grad), COMPUTE, OPERAND, PRECISION) - delta[None, :])
    grad_key = product(grad_logits, q, COMPUTE, OPERAND, PRECISION)
    return product(tl.trans(grad_logits), key, COMPUTE, OPERAND, PRECISION), grad_key, grad_value


@triton.jit
def through_shares(
    share, grad_share, asking, grad_value, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dk / τ and dv that nodes pass to their tokens, from a_uj and ds_uj / τ (nodes, tokens)."""
    grad_k = product(tl.trans(grad_share), asking, COMPUTE, OPERAND, PRECISION)
    return grad_k, product(tl.trans(share), grad_value, COMPUTE, OPERAND, PRECISION)


@triton.jit
def to_holders(
    x, pooled, grad, real, row, level, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """`grad` of the ancestor on a level, in equal shares to the rows that hold its maximum.

    Picked and counted by products with zeros and ones, which are exact.
    """
    span = row >> level
    own = ((span << level) + (1 << level >> 1))[:, None] == row[None, :]
    holds = (x == product(own, pooled, COMPUTE, OPERAND, PRECISION)) & real[:, None]
    count = product(span[:, None] == span[None, :], holds, COMPUTE, OPERAND, PRECISION)
    return tl.where(holds, product(own, grad, COMPUTE, OPERAND, PRECISION) / tl.maximum(count, 1.0), 0.0)


@triton.jit
def passed_down(pooled_ptr, grad_ptr, base, leaf, levels, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):
    """A leaf's maximum, and what its holders get from all ancestors: a row that holds one holds all below it."""
    offset_d = tl.arange(0, BLOCK_D)
    highest, grad = tl.zeros((BLOCK_D,), COMPUTE), tl.zeros((BLOCK_D,), COMPUTE)
    for e in range(0, levels):
        at = (base + (leaf >> (levels - 1 - e))) * BLOCK_D + offset_d
        below = tl.load(pooled_ptr + at)
        grad = tl.load(grad_ptr + at) + tl.where(below == highest, grad, 0.0)
        highest = below
    return highest, grad


@triton.jit(do_not_specialize_on_alignment=COUNTS)
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
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one tile: the tokens themselves, its subtree, and the upper tree."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h, head, start = h.to(tl.int64), b * num_heads + h, tile * BLOCK_N
    row, base = tl.arange(0, BLOCK_N), head * 2 * leaves
    TAU: tl.constexpr = HEAD_DIM**-0.5
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    real, keep = real_rows(mask_ptr + b * mask_b, mask_n, start, length, row, HAS_MASK), start + row < length
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, row, real, HEAD_DIM, BLOCK_D)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, row, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, row, real, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_ptr + b * grad_b + wide_h * grad_h, grad_n, start, row, real, HEAD_DIM, BLOCK_D)
    norm = tl.load(query_norm_ptr + head * length + start + row, mask=keep, other=-NEVER)
    delta = tl.load(delta_ptr + head * length + start + row, mask=keep, other=0.0)
    level, span = places_of(row, LEVELS)
    asking = maxima(q, real, level, LEVELS, BLOCK_N, BLOCK_D, COMPUTE)
    key = maxima(k, real, level, LEVELS, BLOCK_N, BLOCK_D, COMPUTE)

    grad_q, grad_k, grad_v = attention_gradients(
        k, v, q, grad, norm, delta, sees_token(real, CAUSAL, BLOCK_N), SCALE, COMPUTE, OPERAND, PRECISION
    )
    share, some = share_nodes(asking, k, real, level, span, SCALE, BLOCK_N, COMPUTE, OPERAND, PRECISION)
    from_q, grad_key, grad_value = attention_gradients(
        key, product(share, v, COMPUTE, OPERAND, PRECISION), q, grad, norm, delta,
        sees_node(level, span, some, CAUSAL, BLOCK_N), SCALE, COMPUTE, OPERAND, PRECISION,
    )  # fmt: skip
    grad_share = product(grad_value, tl.trans(v), COMPUTE, OPERAND, PRECISION)
    grad_share = share * (grad_share - tl.sum(share * grad_share, axis=1)[:, None])
    from_k, from_v = through_shares(share, grad_share, asking, grad_value, COMPUTE, OPERAND, PRECISION)
    grad_asking = product(grad_share, k, COMPUTE, OPERAND, PRECISION)
    grad_q, grad_k, grad_v = grad_q + from_q, grad_k + from_k, grad_v + from_v

    upper, bias = siblings(leaves + tile, levels, bias_ptr + base, CAUSAL, BLOCK_E)
    upper_key = path(pooled_ptr + plane, base, upper, levels, BLOCK_E, BLOCK_D)
    upper_value = path(value_ptr, base, upper, levels, BLOCK_E, BLOCK_D)
    from_q, _key, _value = attention_gradients(
        upper_key, upper_value, q, grad, norm, delta, (bias == 0)[:, None], SCALE, COMPUTE, OPERAND, PRECISION
    )
    upper_share, upper_asking, upper_grad, grad_share = upper_shares(
        k, v, real, base, upper ^ 1, levels, pooled_ptr, value_ptr, norm_ptr, grad_value_ptr,
        SCALE, BLOCK_E, BLOCK_D, COMPUTE, OPERAND, PRECISION,
    )  # fmt: skip
    from_k, from_v = through_shares(upper_share, grad_share, upper_asking, upper_grad, COMPUTE, OPERAND, PRECISION)
    grad_q, grad_k, grad_v = grad_q + from_q, grad_k + from_k, grad_v + from_v
    grad_v_ptr += b * gv_b + wide_h * gv_h
    store_rows(grad_v_ptr, gv_n, start, row, keep, grad_v, HEAD_DIM, BLOCK_D)

    q, k = widened(q, BLOCK_D, COMPUTE, OPERAND, PRECISION), widened(k, BLOCK_D, COMPUTE, OPERAND, PRECISION)
    highest, passed = passed_down(pooled_ptr, grad_asking_ptr, base, leaves + tile, levels, BLOCK_D, COMPUTE)
    grad_q += tl.where(q == highest[None, :], passed[None, :], 0.0)
    highest, passed = passed_down(pooled_ptr + plane, grad_key_ptr, base, leaves + tile, levels, BLOCK_D, COMPUTE)
    grad_k += tl.where(k == highest[None, :], passed[None, :], 0.0)
    for up in range(1, LEVELS):
        grad_q += to_holders(q, asking, grad_asking, real, row, up, COMPUTE, OPERAND, PRECISION)
        grad_k += to_holders(k, key, grad_key, real, row, up, COMPUTE, OPERAND, PRECISION)
    grad_q = tl.where(real[:, None], grad_q * TAU, 0.0)
    grad_k = tl.where(real[:, None], grad_k * TAU, 0.0)
    store_rows(grad_q_ptr + b * gq_b + wide_h * gq_h, gq_n, start, row, keep, grad_q, HEAD_DIM, BLOCK_D)
    store_rows(grad_k_ptr + b * gk_b + wide_h * gk_h, gk_n, start, row, keep, grad_k, HEAD_DIM, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ launches


def tile_of(q: Tensor) -> int:
    """Tokens of a tile."""
    return TILE if q.dtype == torch.bfloat16 else max(2, TILE // 2)


def allocate(q: Tensor, span: int) -> list[Tensor]:
    """Output (B, H, N, D), laid out as (B, N, H, D), and what the backward pass reads of the call.

    norm (B·H, N); of the upper tree q̂ and k̂ and the rows that hold them (2, B·H, 2P, D'), h (B·H, 2P, D'), bias and
    norm (B·H, 2P)
    """
    batch, heads, length, dim = q.shape
    width, dtype, nodes = block_dim(dim), state_dtype(q.dtype), Tree.over(length, tile_of(q)).nodes
    return [
        q.new_empty(batch, length, heads, dim).transpose(1, 2),
        q.new_empty(batch * heads, length, dtype=dtype),
        *(q.new_empty(2, batch * heads, nodes, width, dtype=dtype) for _ in range(2)),
        q.new_empty(batch * heads, nodes, width, dtype=dtype),
        *(q.new_empty(batch * heads, nodes, dtype=dtype) for _ in range(2)),
    ]


def _constants(q: Tensor, key_mask: Tensor | None, levels: int) -> tuple[dict, dict]:
    """Of the kernel that only pools a tile, with few warps, as it only reduces; of those that multiply."""
    width = block_dim(q.shape[-1])
    flags = dict(HAS_MASK=key_mask is not None, HEAD_DIM=q.shape[-1], BLOCK_N=tile_of(q), BLOCK_D=width)
    few = dict(**flags, COMPUTE=arithmetic(q.dtype)["COMPUTE"], num_warps=max(1, width // 32))
    wide = dict(**flags, BLOCK_E=max(16, triton.next_power_of_2(levels)), **arithmetic(q.dtype))
    return few, dict(**wide, num_warps=WARPS[width])


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, span: int, causal: bool, include_own: bool
) -> list[Tensor]:
    """What `allocate` names; `span` and `include_own` have no meaning here."""
    batch, heads, length, _ = q.shape
    out, norm, pooled, count, value, bias, value_norm = state = allocate(q, span)
    tree, sequences = Tree.over(length, tile_of(q)), batch * heads
    tiles, leaves, levels, nodes = tree
    flags, wide = _constants(q, key_mask, levels)
    mask, width, plane = mask_arguments(key_mask, q), block_dim(q.shape[-1]), pooled.stride(0)
    leaves_kernel[(sequences * leaves,)](
        q, *strides(q), k, *strides(k), *mask, pooled, count, bias, length, heads, leaves, plane, **flags
    )
    if levels > 0:
        few = dict(BLOCK_D=width, COMPUTE=flags["COMPUTE"], num_warps=1)
        pool_kernel[(sequences * (leaves - 1), 2)](pooled, count, bias, leaves, levels, nodes, plane, **few)
        slots = value.new_empty(sequences, tiles, levels, width)
        peak, mass = (value.new_empty(sequences, tiles, levels) for _ in range(2))
        shares_kernel[(sequences * tiles,)](
            k, *strides(k), v, *strides(v), *mask, pooled, peak, mass, slots,
            length, heads, tiles, leaves, levels, **wide,
        )  # fmt: skip
        merge_shares_kernel[(sequences * (nodes - 2),)](
            peak, mass, slots, value, value_norm, tiles, leaves, levels, nodes, **few
        )
    limit = dict(maxnreg=REGISTERS) if wide["num_warps"] == 4 and q.dtype == torch.bfloat16 else {}
    queries_kernel[(sequences * tiles,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask, pooled[1], value, bias, out, *strides(out), norm,
        length, heads, tiles, leaves, levels, CAUSAL=causal, LEVELS=tile_of(q).bit_length() - 1, **wide, **limit,
    )  # fmt: skip
    return state


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: list[Tensor],
    span: int, causal: bool, include_own: bool,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv in the layout of q, k, v."""
    batch, heads, length, _ = q.shape
    out, norm, pooled, count, value, bias, value_norm = state
    tree, sequences = Tree.over(length, tile_of(q)), batch * heads
    tiles, leaves, levels, nodes = tree
    _, wide = _constants(q, key_mask, levels)
    mask, width = mask_arguments(key_mask, q), block_dim(q.shape[-1])
    delta = torch.empty_like(norm)
    grad_asking, grad_key, grad_value = (torch.empty_like(value) for _ in range(3))
    from_queries, from_values = (value.new_empty(sequences, tiles, levels, width) for _ in range(2))
    upper_gradients_kernel[(sequences * tiles,)](
        q, *strides(q), out, *strides(out), grad, *strides(grad), *mask, pooled[1], value, bias, norm, delta,
        from_queries, from_values, length, heads, tiles, leaves, levels, CAUSAL=causal, **wide,
    )  # fmt: skip
    if levels > 0:
        few = dict(BLOCK_D=width, COMPUTE=wide["COMPUTE"], num_warps=1)
        sizes, grid = (tiles, leaves, levels, nodes), (sequences * (nodes - 2),)
        merge_gradients_kernel[grid](from_queries, count[1], grad_key, *sizes, SIBLING=True, SHARED=True, **few)
        merge_gradients_kernel[grid](from_values, count[1], grad_value, *sizes, SIBLING=True, SHARED=False, **few)
        asking_gradients_kernel[(sequences * tiles,)](
            k, *strides(k), v, *strides(v), *mask, pooled, value, value_norm, grad_value, from_queries,
            length, heads, tiles, leaves, levels, **wide,
        )  # fmt: skip
        merge_gradients_kernel[grid](from_queries, count[0], grad_asking, *sizes, SIBLING=False, SHARED=True, **few)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    grad_q, grad_k, grad_v = grads
    tokens_backward_kernel[(sequences * tiles,)](
        q, *strides(q), k, *strides(k), v, *strides(v), grad, *strides(grad), *mask,
        pooled, value, bias, value_norm, grad_asking, grad_key, grad_value, norm, delta,
        grad_q, *strides(grad_q), grad_k, *strides(grad_k), grad_v, *strides(grad_v),
        length, heads, tiles, leaves, levels, pooled.stride(0),
        CAUSAL=causal, LEVELS=tile_of(q).bit_length() - 1, **wide,
    )  # fmt: skip
    return grads
