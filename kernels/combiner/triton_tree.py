"""The upper tree of Combiner-Logsparse: summaries of spans that are longer than a tile, and their gradients.

The tiles of a sequence are its leaves, in heap order: node u has the children 2u and 2u + 1, tile i is the leaf P + i
of P, and behind the end there are leaves without tokens. Arrays by node are (B·H, 2P, …); 0 is unused, 1 is the root,
which nobody sees. What a tile contributes to its ancestors goes to slots (B·H, tiles, levels, …), which are added in
fixed order.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import triton
import triton.language as tl

from kernels.combiner.triton import held_maximum
from kernels.common.launch import COUNTS
from kernels.common.tiles import LOG2E, NEVER, load_rows, place, product, real_rows

SLOTS = tl.constexpr(32)
"""Tiles that a program of a merge reads at once."""


class Tree(NamedTuple):
    """Tiles of a sequence; leaves of the tree, a power of two; levels below its root; nodes, with the unused 0."""

    tiles: int
    leaves: int
    levels: int
    nodes: int

    @classmethod
    def over(cls, length: int, tile: int) -> "Tree":
        tiles = triton.cdiv(length, tile)
        leaves = triton.next_power_of_2(tiles)
        return cls(tiles, leaves, leaves.bit_length() - 1, 2 * leaves)


@triton.jit
def level_of(node, leaves, levels):
    """Levels between a node and the leaves below it."""
    level = 0
    for e in range(1, levels + 1):
        level += tl.where((node << e) < 2 * leaves, 1, 0)
    return level


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def leaves_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    mask_ptr, mask_b, mask_n,
    pooled_ptr, count_ptr, bias_ptr,  # q̂, k̂ (2, B·H, 2P, D'), rows that hold them (the same), bias (B·H, 2P)
    length, num_heads, leaves, plane,
    HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """q̂ and k̂ of one tile; also of those behind the end, which are leaves without tokens."""
    b, h, tile = place(tl.program_id(0), num_heads, leaves)
    wide_h, start = h.to(tl.int64), tile * BLOCK_N
    offset_n, offset_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK)
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    asking, asking_ties = held_maximum(q, real, COMPUTE)
    key, key_ties = held_maximum(k, real, COMPUTE)
    leaf = (b * num_heads + h) * 2 * leaves + leaves + tile
    tl.store(pooled_ptr + leaf * BLOCK_D + offset_d, asking)
    tl.store(pooled_ptr + plane + leaf * BLOCK_D + offset_d, key)
    tl.store(count_ptr + leaf * BLOCK_D + offset_d, asking_ties)
    tl.store(count_ptr + plane + leaf * BLOCK_D + offset_d, key_ties)
    some = tl.max(real.to(tl.int32), axis=0)
    tl.store(bias_ptr + leaf, tl.where(some > 0, 0.0, NEVER))


@triton.jit(do_not_specialize_on_alignment=COUNTS)
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
def path(ptr, base, node, levels, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one node a level, (BLOCK_E, D'), zero above the last level; `ptr` has (2P, D') a head."""
    position = (base + node)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(ptr + position, mask=(tl.arange(0, BLOCK_E) < levels)[:, None], other=0.0)


@triton.jit
def siblings(leaf, levels, bias_ptr, CAUSAL: tl.constexpr, BLOCK_E: tl.constexpr):
    """The siblings of a leaf and of its ancestors, and the bias with which the queries of the leaf see them."""
    level = tl.arange(0, BLOCK_E)
    node = leaf >> level
    bias = tl.load(bias_ptr + (node ^ 1), mask=level < levels, other=NEVER)
    if CAUSAL:
        bias = tl.where((node ^ 1) < node, bias, NEVER)
    return node ^ 1, bias


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def shares_kernel(
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    pooled_ptr, peak_ptr, mass_ptr, value_ptr,  # q̂; slots (B·H, tiles, levels), with D'
    length, num_heads, tiles, leaves, levels,
    HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile has in the softmax of every ancestor, itself the first."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h, head, start = h.to(tl.int64), b * num_heads + h, tile * BLOCK_N
    offset_n, level = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    asking = path(pooled_ptr, head * 2 * leaves, (leaves + tile) >> level, levels, BLOCK_E, BLOCK_D)
    logits = product(asking, tl.trans(k), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E)
    logits = tl.where(real[None, :], logits, NEVER)
    peak = tl.max(logits, axis=1)
    weights = tl.where(real[None, :], tl.exp2(logits - peak[:, None]), 0.0)
    slot = (head * tiles + tile) * levels + level
    tl.store(peak_ptr + slot, peak, mask=level < levels)
    tl.store(mass_ptr + slot, tl.sum(weights, axis=1), mask=level < levels)
    value = product(weights, v, COMPUTE, OPERAND, PRECISION)
    store_path(value_ptr, (head * tiles + tile) * levels, value, levels, BLOCK_E, BLOCK_D)


@triton.jit
def store_path(ptr, slot, x, levels, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row a level to the slots of a tile, from `slot` on."""
    level = tl.arange(0, BLOCK_E)
    position = (slot + level)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + position, x, mask=(level < levels)[:, None])


@triton.jit(do_not_specialize_on_alignment=COUNTS)
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


@triton.jit(do_not_specialize_on_alignment=COUNTS)
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


@triton.jit(do_not_specialize_on_alignment=COUNTS)
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
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """δ of one tile of queries, and what they pass to k̂ / τ and h of the siblings of every ancestor."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h, head, start = h.to(tl.int64), b * num_heads + h, tile * BLOCK_N
    row, base = tl.arange(0, BLOCK_N), head * 2 * leaves
    real, keep = real_rows(mask_ptr + b * mask_b, mask_n, start, length, row, HAS_MASK), start + row < length
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, row, real, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr + b * out_b + wide_h * out_h, out_n, start, row, real, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_ptr + b * grad_b + wide_h * grad_h, grad_n, start, row, real, HEAD_DIM, BLOCK_D)
    norm = tl.load(norm_ptr + head * length + start + row, mask=keep, other=-NEVER)
    delta = tl.sum(grad.to(COMPUTE) * out.to(COMPUTE), axis=1)
    tl.store(delta_ptr + head * length + start + row, delta, mask=keep)
    other, bias = siblings(leaves + tile, levels, bias_ptr + base, CAUSAL, BLOCK_E)
    key = path(pooled_ptr, base, other, levels, BLOCK_E, BLOCK_D)
    value = path(value_ptr, base, other, levels, BLOCK_E, BLOCK_D)
    logits = product(key, tl.trans(q), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E) + bias[:, None]
    weights = tl.exp2(logits - norm[None, :])
    grad_logits = weights * (product(value, tl.trans(grad), COMPUTE, OPERAND, PRECISION) - delta[None, :])
    slot = (head * tiles + tile) * levels
    grad_key = product(grad_logits, q, COMPUTE, OPERAND, PRECISION)
    store_path(grad_key_ptr, slot, grad_key, levels, BLOCK_E, BLOCK_D)
    grad_value = product(weights, grad, COMPUTE, OPERAND, PRECISION)
    store_path(grad_value_ptr, slot, grad_value, levels, BLOCK_E, BLOCK_D)


@triton.jit
def upper_shares(
    k, v, real, base, node, levels, pooled_ptr, value_ptr, norm_ptr, grad_value_ptr,
    SCALE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Shares a_j of the tokens of one tile in its ancestors, (BLOCK_E, T), q̂ and dh of these, and ds_j / τ."""
    asking = path(pooled_ptr, base, node, levels, BLOCK_E, BLOCK_D)
    grad_value = path(grad_value_ptr, base, node, levels, BLOCK_E, BLOCK_D)
    inner = tl.sum(grad_value * path(value_ptr, base, node, levels, BLOCK_E, BLOCK_D), axis=1)
    norm = tl.load(norm_ptr + base + node, mask=tl.arange(0, BLOCK_E) < levels, other=-NEVER)
    logits = tl.where(real[None, :], product(asking, tl.trans(k), COMPUTE, OPERAND, PRECISION) * SCALE, NEVER)
    share = tl.exp2(logits - norm[:, None])
    grad_share = product(grad_value, tl.trans(v), COMPUTE, OPERAND, PRECISION)
    return share, asking, grad_value, share * (grad_share - inner[:, None])


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def asking_gradients_kernel(
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    pooled_ptr, value_ptr, norm_ptr, grad_value_ptr,  # q̂, h, norm, dh (B·H, 2P, D') or without D'
    slot_ptr,  # (B·H, tiles, levels, D')
    length, num_heads, tiles, leaves, levels,
    HAS_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of keys passes to q̂ / τ of every ancestor."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h, head, start = h.to(tl.int64), b * num_heads + h, tile * BLOCK_N
    row, node = tl.arange(0, BLOCK_N), (leaves + tile) >> tl.arange(0, BLOCK_E)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, row, HAS_MASK)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, row, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, row, real, HEAD_DIM, BLOCK_D)
    _share, _asking, _grad, grad_share = upper_shares(
        k, v, real, head * 2 * leaves, node, levels, pooled_ptr, value_ptr, norm_ptr, grad_value_ptr,
        HEAD_DIM**-0.5 * LOG2E, BLOCK_E, BLOCK_D, COMPUTE, OPERAND, PRECISION,
    )  # fmt: skip
    grad_asking = product(grad_share, k, COMPUTE, OPERAND, PRECISION)
    store_path(slot_ptr, (head * tiles + tile) * levels, grad_asking, levels, BLOCK_E, BLOCK_D)
