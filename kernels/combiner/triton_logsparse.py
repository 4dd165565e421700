"""Combiner-Logsparse in Triton, causal and bidirectional: every query sees the siblings of its ancestors in a tree.

A tile of T = 2ᵗ tokens is a subtree that one program holds in registers: the levels below t need no memory and no
matrix product, since a query sees one node a level. The tiles are the leaves of an upper tree in heap order (node u has
the children 2u and 2u + 1, tile i is the leaf P + i), whose k̂, h, q̂ lie in memory, O(N / T) of them:

forward   leaves (2 touches of one (B, H, N, D) tensor: q, k), pooling; shares (2: k, v), merging; queries (4)
backward  gradients of upper k̂ and h (3: q, out, do), merging; of upper q̂ (2: k, v), merging; everything else (7)

Sums over the tiles of a node go through slots, added in fixed order.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.combiner.triton import LOG2E, pool
from kernels.common.launch import arithmetic, block_dim, mask_arguments, state_dtype, strides
from kernels.common.tiles import NEVER, load_rows, place, real_rows, store_rows

SLOTS = tl.constexpr(32)
"""Tiles that a program of the upper tree reads at once."""


# ------------------------------------------------------------------------------------------- levels below that of a tile


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


# ------------------------------------------------------------------------------------------------------- the upper tree


@triton.jit
def level_of(node, leaves, levels):
    """Levels between a node and the leaves below it."""
    level = 0
    for e in range(1, levels + 1):
        level += tl.where((node << e) < 2 * leaves, 1, 0)
    return level


@triton.jit
def leaves_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    mask_ptr, mask_b, mask_n,
    pooled_ptr, count_ptr, bias_ptr,  # q̂, k̂ (2, B·H, 2P, D'), rows that hold them (the same), bias (B·H, 2P)
    length, num_heads, leaves, plane,
    HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """q̂ and k̂ of one tile; also of those behind the end, which hold no token."""
    b, h, tile = place(tl.program_id(0), num_heads, leaves)
    wide_h, start = h.to(tl.int64), tile * BLOCK_N
    offset_n, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK)
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    node = (b * num_heads + h) * 2 * leaves + leaves + tile
    asking, asking_share = pool(q, real, COMPUTE)
    key, key_share = pool(k, real, COMPUTE)
    tl.store(pooled_ptr + node * BLOCK_D + offset_d, asking)
    tl.store(pooled_ptr + plane + node * BLOCK_D + offset_d, key)
    tl.store(count_ptr + node * BLOCK_D + offset_d, 1.0 / asking_share)
    tl.store(count_ptr + plane + node * BLOCK_D + offset_d, 1.0 / key_share)
    some = tl.max(real.to(tl.int32), axis=0)
    tl.store(bias_ptr + node, tl.where(some > 0, 0.0, NEVER))


@triton.jit
def pool_kernel(
    pooled_ptr, count_ptr, bias_ptr, leaves, levels, nodes, plane,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """q̂ (program_id(1) = 0) or k̂ (1) of one inner node of the upper tree, from its leaves."""
    node = 1 + tl.program_id(0) % (leaves - 1)
    base = (tl.program_id(0) // (leaves - 1)).to(tl.int64) * nodes
    level = level_of(node, leaves, levels)
    offset_s, offset_d = tl.arange(0, SLOTS), tl.arange(0, BLOCK_D)
    pooled_ptr += tl.program_id(1) * plane + base * BLOCK_D
    count_ptr += tl.program_id(1) * plane + base * BLOCK_D
    bias_ptr += base
    highest, count = tl.full((BLOCK_D,), float("-inf"), COMPUTE), tl.zeros((BLOCK_D,), COMPUTE)
    for first in range(node << level, (node + 1) << level, SLOTS):
        leaf = first + offset_s
        inside = leaf < ((node + 1) << level)
        exists = inside & (tl.load(bias_ptr + leaf, mask=inside, other=NEVER) == 0)
        position = leaf[:, None] * BLOCK_D + offset_d[None, :]
        x = tl.load(pooled_ptr + position, mask=exists[:, None], other=float("-inf"))
        held = tl.load(count_ptr + position, mask=exists[:, None], other=0.0)
        higher = tl.maximum(highest, tl.max(x, axis=0))
        count = tl.where(highest == higher, count, 0.0) + tl.sum(tl.where(x == higher[None, :], held, 0.0), axis=0)
        highest = higher
    some = tl.max(highest, axis=0) > float("-inf")
    tl.store(pooled_ptr + node * BLOCK_D + offset_d, tl.where(some, highest, 0.0))
    tl.store(count_ptr + node * BLOCK_D + offset_d, tl.maximum(count, 1.0))
    tl.store(bias_ptr + node, tl.where(some, 0.0, NEVER))


@triton.jit
def shares_kernel(
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    pooled_ptr, peak_ptr, mass_ptr, value_ptr,  # q̂; slots (B·H, tiles, levels), with D'
    length, num_heads, tiles, leaves, levels,
    HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What one tile has in the softmax of every ancestor, itself the first."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h, head, start = h.to(tl.int64), b * num_heads + h, tile * BLOCK_N
    offset_n, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    for e in range(levels):
        node = (leaves + tile) >> e
        asking = tl.load(pooled_ptr + (head * 2 * leaves + node) * BLOCK_D + offset_d)
        logits = tl.where(real, tl.sum(k * asking[None, :], axis=1) * (HEAD_DIM**-0.5 * LOG2E), NEVER)
        peak = tl.max(logits, axis=0)
        weights = tl.where(real, tl.exp2(logits - peak), 0.0)
        slot = (head * tiles + tile) * levels + e
        tl.store(peak_ptr + slot, peak)
        tl.store(mass_ptr + slot, tl.sum(weights, axis=0))
        tl.store(value_ptr + slot * BLOCK_D + offset_d, tl.sum(weights[:, None] * v, axis=0))


@triton.jit
def merge_shares_kernel(
    peak_ptr, mass_ptr, slot_ptr, value_ptr, norm_ptr,  # slots (B·H, tiles, levels); h (B·H, 2P, D'), norm (B·H, 2P)
    tiles, leaves, levels, nodes,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """h and the log₂ of the normaliser of one node below the root, from its tiles."""
    node = 2 + tl.program_id(0) % (nodes - 2)
    head = (tl.program_id(0) // (nodes - 2)).to(tl.int64)
    level = level_of(node, leaves, levels)
    offset_s, offset_d = tl.arange(0, SLOTS), tl.arange(0, BLOCK_D)
    peak, mass, value = tl.full((), NEVER, COMPUTE), tl.full((), 0.0, COMPUTE), tl.zeros((BLOCK_D,), COMPUTE)
    last = tl.minimum(((node + 1) << level) - leaves, tiles)
    for first in range((node << level) - leaves, last, SLOTS):
        inside = first + offset_s < last
        slot = (head * tiles + first + offset_s) * levels + level
        peaks = tl.load(peak_ptr + slot, mask=inside, other=NEVER)
        masses = tl.load(mass_ptr + slot, mask=inside, other=0.0)
        values = tl.load(slot_ptr + slot[:, None] * BLOCK_D + offset_d[None, :], mask=inside[:, None], other=0.0)
        higher = tl.maximum(peak, tl.max(peaks, axis=0))
        weights, share = tl.exp2(peaks - higher), tl.exp2(peak - higher)
        mass = mass * share + tl.sum(weights * masses, axis=0)
        value = value * share + tl.sum(weights[:, None] * values, axis=0)
        peak = higher
    some = mass > 0
    mass = tl.where(some, mass, 1.0)
    tl.store(value_ptr + (head * nodes + node) * BLOCK_D + offset_d, tl.where(some, value / mass, 0.0))
    tl.store(norm_ptr + head * nodes + node, tl.where(some, peak + tl.log2(mass), -NEVER))


@triton.jit
def merge_gradients_kernel(
    slot_ptr, count_ptr, out_ptr, tiles, leaves, levels, nodes,  # slots (B·H, tiles, levels, D'); (B·H, 2P, D')
    SIBLING: tl.constexpr, SHARED: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sum of one node's slots over its tiles or, with SIBLING, its sibling's; SHARED divides it among ties."""
    node = 2 + tl.program_id(0) % (nodes - 2)
    head = (tl.program_id(0) // (nodes - 2)).to(tl.int64)
    level = level_of(node, leaves, levels)
    source = (node ^ 1) if SIBLING else node
    offset_s, offset_d = tl.arange(0, SLOTS), tl.arange(0, BLOCK_D)
    grad = tl.zeros((BLOCK_D,), COMPUTE)
    last = tl.minimum(((source + 1) << level) - leaves, tiles)
    for first in range((source << level) - leaves, last, SLOTS):
        slot = (head * tiles + first + offset_s) * levels + level
        position = slot[:, None] * BLOCK_D + offset_d[None, :]
        grad += tl.sum(tl.load(slot_ptr + position, mask=(first + offset_s < last)[:, None], other=0.0), axis=0)
    at = (head * nodes + node) * BLOCK_D + offset_d
    if SHARED:
        grad = grad / tl.load(count_ptr + at)
    tl.store(out_ptr + at, grad)


@triton.jit
def upper_sibling(node, bias_ptr, CAUSAL: tl.constexpr):
    """The sibling of a node and the bias with which the queries below the node see it."""
    other = node ^ 1
    bias = tl.load(bias_ptr + other)
    if CAUSAL:
        bias = tl.where(other < node, bias, NEVER)
    return other, bias


# --------------------------------------------------------------------------------------------------------------- tokens


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
def upper_gradients_kernel(
    q_ptr, q_b, q_h, q_n,
    out_ptr, out_b, out_h, out_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    pooled_ptr, value_ptr, bias_ptr,  # k̂, h (B·H, 2P, D'), bias (B·H, 2P)
    norm_ptr, delta_ptr,  # (B·H, N)
    grad_key_ptr, grad_value_ptr,  # slots (B·H, tiles, levels, D')
    length, num_heads, tiles, leaves, levels,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """δ of one tile of queries, and what they pass to k̂ / τ and h of the siblings of every ancestor."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h, head, start = h.to(tl.int64), b * num_heads + h, tile * BLOCK_N
    row, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    real, keep = real_rows(mask_ptr + b * mask_b, mask_n, start, length, row, HAS_MASK), start + row < length
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    out = load_rows(out_ptr + b * out_b + wide_h * out_h, out_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    grad = load_rows(grad_ptr + b * grad_b + wide_h * grad_h, grad_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    norm = tl.load(norm_ptr + head * length + start + row, mask=keep, other=-NEVER)
    delta = tl.sum(grad * out, axis=1)
    tl.store(delta_ptr + head * length + start + row, delta, mask=keep)
    base = head * 2 * leaves
    for e in range(levels):
        other, bias = upper_sibling((leaves + tile) >> e, bias_ptr + base, CAUSAL)
        key = tl.load(pooled_ptr + (base + other) * BLOCK_D + offset_d)
        value = tl.load(value_ptr + (base + other) * BLOCK_D + offset_d)
        weight = tl.exp2(tl.sum(q * key[None, :], axis=1) * (HEAD_DIM**-0.5 * LOG2E) + bias - norm)
        grad_logits = weight * (tl.sum(grad * value[None, :], axis=1) - delta)
        slot = ((head * tiles + tile) * levels + e) * BLOCK_D + offset_d
        tl.store(grad_key_ptr + slot, tl.sum(grad_logits[:, None] * q, axis=0))
        tl.store(grad_value_ptr + slot, tl.sum(weight[:, None] * grad, axis=0))


@triton.jit
def ancestor(
    k, v, real, base, node, pooled_ptr, value_ptr, norm_ptr, grad_value_ptr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """q̂ and dh of a node, and for the rows of one of its tiles their shares a_j and ds_j / τ."""
    at = (base + node) * BLOCK_D + tl.arange(0, BLOCK_D)
    asking, grad_value = tl.load(pooled_ptr + at), tl.load(grad_value_ptr + at)
    inner = tl.sum(grad_value * tl.load(value_ptr + at), axis=0)
    logits = tl.where(real, tl.sum(k * asking[None, :], axis=1) * SCALE, NEVER)
    share = tl.exp2(logits - tl.load(norm_ptr + base + node))
    return asking, grad_value, share, share * (tl.sum(v * grad_value[None, :], axis=1) - inner)


@triton.jit
def asking_gradients_kernel(
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    pooled_ptr, value_ptr, norm_ptr, grad_value_ptr,  # q̂, h, norm, dh (B·H, 2P, D') or without D'
    slot_ptr,  # (B·H, tiles, levels, D')
    length, num_heads, tiles, leaves, levels,
    HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What one tile of keys passes to q̂ / τ of every ancestor."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h, head, start = h.to(tl.int64), b * num_heads + h, tile * BLOCK_N
    row, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, row, HAS_MASK)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, row, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    base = head * 2 * leaves
    for e in range(levels):
        _, _, _, grad_share = ancestor(
            k, v, real, base, (leaves + tile) >> e, pooled_ptr, value_ptr, norm_ptr, grad_value_ptr,
            BLOCK_D, HEAD_DIM**-0.5 * LOG2E,
        )  # fmt: skip
        slot = ((head * tiles + tile) * levels + e) * BLOCK_D + offset_d
        tl.store(slot_ptr + slot, tl.sum(grad_share[:, None] * k, axis=0))


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


TILE = 64
WARPS = {16: 2, 32: 4, 64: 4, 128: 8}
"""By padded head dimension."""


class Tree(NamedTuple):
    """Tiles of a sequence, leaves of the upper tree (a power of two), levels below its root, nodes with the unused 0."""

    tiles: int
    leaves: int
    levels: int
    nodes: int

    @classmethod
    def over(cls, length: int) -> "Tree":
        tiles = triton.cdiv(length, TILE)
        leaves = triton.next_power_of_2(tiles)
        return cls(tiles, leaves, leaves.bit_length() - 1, 2 * leaves)


def allocate(q: Tensor, span: int) -> list[Tensor]:
    """Output (B, H, N, D), laid out as (B, N, H, D), and what the backward pass reads of the call.

    norm (B·H, N), q̂ and k̂ and the rows that hold them (2, B·H, 2P, D'), h (B·H, 2P, D'), bias and norm (B·H, 2P)
    """
    batch, heads, length, dim = q.shape
    width, nodes, dtype = block_dim(dim), Tree.over(length).nodes, state_dtype(q.dtype)
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
    tree, sequences, flags = Tree.over(length), batch * heads, _constants(q, key_mask)
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
    tree, sequences, flags = Tree.over(length), batch * heads, _constants(q, key_mask)
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
