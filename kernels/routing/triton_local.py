"""Local heads of routing attention in Triton: a query sees the real tokens of its own block and of its neighbours.

A program takes one tile of a block, at most `TILE` tokens. Forward: the tiles of three blocks, online softmax.
Backward: dq over the keys of three blocks, then dk and dv over their queries, the scores transposed so that no tile of
weights is. That is 7 matrix products for each pair of tiles where 5 would do; in return one launch, no partial sums.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import COUNTS, arithmetic, block_dim, mask_arguments, state_dtype, strides
from kernels.common.tiles import LOG2E, NEVER, load_rows, place, product, real_rows, store_rows

STAGES, BACKWARD_STAGES = 2, 1

# By bytes of an element and padded head dimension: the most tokens of a tile.
TILE = {
    2: dict.fromkeys((16, 32, 64, 128), 64),
    4: {16: 64, 32: 64, 64: 64, 128: 32},
    8: dict.fromkeys((16, 32, 64, 128), 32),
}


@triton.jit
def tile_of(tile, block, length, mask_ptr, mask_n, HAS_MASK: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """First token of a tile, its rows that exist, and those that are real; TILES tiles make a block."""
    start, row = tile // TILES * block + tile % TILES * BLOCK_N, tl.arange(0, BLOCK_N)
    inside = (tile % TILES * BLOCK_N + row < block) & (start + row < length)
    return start, inside, inside & real_rows(mask_ptr, mask_n, start, length, row, HAS_MASK)


@triton.jit
def read_tile(
    x_ptr, x_n, y_ptr, y_n, tile, block, length, mask_ptr, mask_n,
    HAS_MASK: tl.constexpr, TILES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What `tile_of` says, and the real rows of two tensors."""
    start, inside, real = tile_of(tile, block, length, mask_ptr, mask_n, HAS_MASK, TILES, BLOCK_N)
    row = tl.arange(0, BLOCK_N)
    x = load_rows(x_ptr, x_n, start, row, real, HEAD_DIM, BLOCK_D)
    y = load_rows(y_ptr, y_n, start, row, real, HEAD_DIM, BLOCK_D)
    return start, inside, real, x, y


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def local_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    out_ptr, out_b, out_h, out_n,
    lse_ptr,  # (B·H, N)
    length, block, first_head, num_heads, tiles,
    FULL: tl.constexpr, CAUSAL: tl.constexpr, TILES: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of one tile. FULL: every tile is full of real tokens."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    head, wide_h = b * num_heads + h, (first_head + h).to(tl.int64)
    q_ptr += b * q_b + wide_h * q_h
    k_ptr += b * k_b + wide_h * k_h
    v_ptr += b * v_b + wide_h * v_h
    out_ptr += b * out_b + wide_h * out_h
    mask_ptr += b * mask_b
    row = tl.arange(0, BLOCK_N)
    start, inside, real = tile_of(tile, block, length, mask_ptr, mask_n, HAS_MASK, TILES, BLOCK_N)
    q = load_rows(q_ptr, q_n, start, row, real, HEAD_DIM, BLOCK_D)
    peak = tl.full((BLOCK_N,), NEVER, COMPUTE)
    mass, out = tl.zeros((BLOCK_N,), COMPUTE), tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    after = tile // TILES + (1 if CAUSAL else 2)
    for other in range(tl.maximum(tile // TILES - 1, 0) * TILES, tl.minimum(after * TILES, tiles)):
        other_start, _, visible, k, v = read_tile(
            k_ptr, k_n, v_ptr, v_n, other, block, length, mask_ptr, mask_n, HAS_MASK, TILES, HEAD_DIM, BLOCK_N, BLOCK_D
        )
        scores = product(q, tl.trans(k), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E)
        if not FULL:
            seen = visible[None, :]
            if CAUSAL:
                seen = seen & (other_start + row[None, :] <= start + row[:, None])
            scores = tl.where(seen, scores, NEVER)
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        decay = tl.exp2(peak - higher)
        mass = mass * decay + tl.sum(weights, axis=1)
        out = out * decay[:, None] + product(weights, v, COMPUTE, OPERAND, PRECISION)
        peak = higher
    out = tl.where(real[:, None], out / mass[:, None], 0.0)
    store_rows(out_ptr, out_n, start, row, inside, out, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head * length + start + row, peak + tl.log2(mass), mask=inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def local_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    out_ptr, out_b, out_h, out_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    lse_ptr,
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    length, block, first_head, num_heads, tiles,
    FULL: tl.constexpr, CAUSAL: tl.constexpr, TILES: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of one tile."""
    b, h, tile = place(tl.program_id(0), num_heads, tiles)
    wide_h = (first_head + h).to(tl.int64)
    q_ptr += b * q_b + wide_h * q_h
    k_ptr += b * k_b + wide_h * k_h
    v_ptr += b * v_b + wide_h * v_h
    out_ptr += b * out_b + wide_h * out_h
    grad_ptr += b * grad_b + wide_h * grad_h
    grad_q_ptr += b * gq_b + wide_h * gq_h
    grad_k_ptr += b * gk_b + wide_h * gk_h
    grad_v_ptr += b * gv_b + wide_h * gv_h
    mask_ptr += b * mask_b
    lse_ptr += (b * num_heads + h) * length
    row = tl.arange(0, BLOCK_N)
    start, inside, real = tile_of(tile, block, length, mask_ptr, mask_n, HAS_MASK, TILES, BLOCK_N)
    first = tl.maximum(tile // TILES - 1, 0) * TILES

    q = load_rows(q_ptr, q_n, start, row, real, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_ptr, grad_n, start, row, real, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr, out_n, start, row, real, HEAD_DIM, BLOCK_D)
    delta = tl.sum(grad.to(COMPUTE) * out.to(COMPUTE), axis=1)
    lse = tl.load(lse_ptr + start + row, mask=inside, other=0.0)
    grad_q = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for other in range(first, tl.minimum((tile // TILES + (1 if CAUSAL else 2)) * TILES, tiles)):
        other_start, _, visible, k, v = read_tile(
            k_ptr, k_n, v_ptr, v_n, other, block, length, mask_ptr, mask_n, HAS_MASK, TILES, HEAD_DIM, BLOCK_N, BLOCK_D
        )
        scores = product(q, tl.trans(k), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E)
        scores -= lse[:, None]
        if not FULL:
            seen = real[:, None] & visible[None, :]
            if CAUSAL:
                seen = seen & (other_start + row[None, :] <= start + row[:, None])
            scores = tl.where(seen, scores, NEVER)
        weights = tl.exp2(scores)
        grad_weights = product(grad, tl.trans(v), COMPUTE, OPERAND, PRECISION)
        grad_q += product(weights * (grad_weights - delta[:, None]), k, COMPUTE, OPERAND, PRECISION)
    store_rows(grad_q_ptr, gq_n, start, row, inside, grad_q * (HEAD_DIM**-0.5), HEAD_DIM, BLOCK_D)

    k = load_rows(k_ptr, k_n, start, row, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, v_n, start, row, real, HEAD_DIM, BLOCK_D)
    grad_k, grad_v = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE), tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for other in range(tile // TILES * TILES if CAUSAL else first, tl.minimum((tile // TILES + 2) * TILES, tiles)):
        other_start, present, seeing, q, grad = read_tile(
            q_ptr, q_n, grad_ptr, grad_n, other, block, length, mask_ptr, mask_n, HAS_MASK, TILES, HEAD_DIM, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
        out = load_rows(out_ptr, out_n, other_start, row, seeing, HEAD_DIM, BLOCK_D)
        delta = tl.sum(grad.to(COMPUTE) * out.to(COMPUTE), axis=1)
        lse = tl.load(lse_ptr + other_start + row, mask=present, other=0.0)
        scores = product(k, tl.trans(q), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E)  # (keys, queries)
        scores -= lse[None, :]
        if not FULL:
            seen = real[:, None] & seeing[None, :]
            if CAUSAL:
                seen = seen & (start + row[:, None] <= other_start + row[None, :])
            scores = tl.where(seen, scores, NEVER)
        weights = tl.exp2(scores)
        grad_v += product(weights, grad, COMPUTE, OPERAND, PRECISION)
        grad_weights = product(v, tl.trans(grad), COMPUTE, OPERAND, PRECISION)
        grad_k += product(weights * (grad_weights - delta[None, :]), q, COMPUTE, OPERAND, PRECISION)
    store_rows(grad_k_ptr, gk_n, start, row, inside, grad_k * (HEAD_DIM**-0.5), HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr, gv_n, start, row, inside, grad_v, HEAD_DIM, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ launches


def local_flags(q: Tensor, key_mask: Tensor | None, block: int, causal: bool) -> tuple[int, int, dict]:
    """Block, tiles of a sequence, and the constants of a launch."""
    length, dim = q.shape[2:]
    block, width = min(block, length), block_dim(dim)
    tile = min(TILE[q.element_size()][width], max(16, triton.next_power_of_2(block)))
    full = key_mask is None and not causal and block % tile == 0 and length % block == 0
    flags = dict(
        FULL=full, CAUSAL=causal, TILES=triton.cdiv(block, tile), HAS_MASK=key_mask is not None,
        HEAD_DIM=dim, BLOCK_N=tile, BLOCK_D=width, **arithmetic(q.dtype),
    )  # fmt: skip
    return block, triton.cdiv(length, block) * triton.cdiv(block, tile), flags


def local(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, first_head: int, block: int, causal: bool
) -> Tensor:
    """Write the heads of `out` from `first_head` on; returns log-sums (B·H, N), in base 2."""
    batch, heads, length, _ = q.shape
    heads -= first_head
    block, tiles, flags = local_flags(q, key_mask, block, causal)
    lse = torch.empty(batch * heads, length, dtype=state_dtype(q.dtype), device=q.device)
    local_kernel[(batch * heads * tiles,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask_arguments(key_mask, q), out, *strides(out), lse,
        length, block, first_head, heads, tiles, **flags, num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    return lse


def local_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor,
    grads: list[Tensor], first_head: int, block: int, causal: bool,
) -> None:  # fmt: skip
    """Write the heads of dq, dk, dv from `first_head` on."""
    batch, heads, length, _ = q.shape
    heads -= first_head
    block, tiles, flags = local_flags(q, key_mask, block, causal)
    to = [y for x in grads for y in (x, *strides(x))]
    local_backward_kernel[(batch * heads * tiles,)](
        q, *strides(q), k, *strides(k), v, *strides(v), out, *strides(out), grad, *strides(grad),
        *mask_arguments(key_mask, q), lse, *to, length, block, first_head, heads, tiles,
        **flags, num_warps=4, num_stages=BACKWARD_STAGES,
    )  # fmt: skip
