"""MRA-2 and MRA-2-s in Triton: the backward pass.

With L_i the log-mass of query i, P_ij = e^{τ q_i·k_j − L_i} and δ_i = do_i·o_i. The unrefined pairs need block rows
only: with the weights W_xy = c_y e^{S_xy − p_x} ≤ c_y and p_x = max S_xy that the forward pass leaves (triton_lists),
and u_x = Σ_i e^{p_x − L_i} do_i, t_x = Σ_i e^{p_x − L_i} δ_i over the queries of block x, where p_x ≤ L_i,

    dS_xy = W_xy (u_x·v̄_y − t_x),
    dq̄_x = τ Σ_y dS_xy k̄_y,  dk̄_y = τ Σ_x dS_xy q̄_x,  dv̄_y = Σ_x W_xy u_x,  each shared by the tokens of its block.

    columns    the list of every key block (triton_lists)
    summarise  δ, and u, t: 2 touches
    coarse     dq̄, dk̄, dv̄
    queries    dq of a block over its list: 3 touches, 3 products a tile
    keys       dk and dv of a block over its list: 4 touches, 4 products a tile
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import COUNTS, arithmetic, block_dim, mask_arguments, strides
from kernels.common.tiles import LOG2E, load_rows, place, product, real_rows, store_rows
from kernels.mra.triton import Walk, is_dense, list_of, listed_block, operand, real_listed
from kernels.mra.triton_lists import Selection, transpose
from kernels.mra.triton_pool import fill_rows, load_means, operand_dtype

# By padded head dimension.
QUERIES = {16: Walk(1, 3), 32: Walk(1, 3, 168), 64: Walk(2, 3), 128: Walk(4, 3)}
COARSE = {16: (64, 64, 4, 2), 32: (64, 64, 4, 3), 64: (64, 64, 8, 2), 128: (32, 32, 4, 2)}
KEYS = {16: Walk(1, 3), 32: Walk(1, 3, 200), 64: Walk(2, 3), 128: Walk(4, 3)}


@triton.jit
def summarise_kernel(
    out_ptr, out_b, out_h, out_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    log_mass_ptr, delta_ptr, peak_ptr, sum_ptr, share_ptr,  # L, δ (B·H, nb · b); p, u, t (B·H, P, …)
    length, num_heads, num_blocks, side,
    FULL: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """δ of the tokens of a block, and with FULL what it leaves to the coarse gradient."""
    b, h, x = place(tl.program_id(0), num_heads, num_blocks)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    offset_n, offset_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    start = x * BLOCK
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK)
    out = load_rows(out_ptr + b * out_b + wide_h * out_h, out_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_ptr + b * grad_b + wide_h * grad_h, grad_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    grad = grad.to(COMPUTE)
    delta = tl.sum(out.to(COMPUTE) * grad, axis=1)
    row = (head * num_blocks + x) * BLOCK + offset_n
    tl.store(delta_ptr + row, delta)
    if FULL:
        weight = tl.exp2(tl.load(peak_ptr + head * side + x) - tl.load(log_mass_ptr + row))
        share_ptr += head * side
        sum_ptr += head * side * BLOCK_D
        tl.store(share_ptr + x, tl.sum(weight * delta))
        tl.store(sum_ptr + x * BLOCK_D + offset_d, tl.sum(weight[:, None] * grad, axis=0))
        if x == num_blocks - 1:
            fill_rows(share_ptr, 0.0, num_blocks, side, 1)
            fill_rows(sum_ptr, 0.0, num_blocks, side, BLOCK_D)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def coarse_kernel(
    mean_q_ptr, mean_k_ptr, mean_v_ptr, count_ptr, weight_ptr, sum_ptr, share_ptr,
    grad_q_ptr, grad_k_ptr, grad_v_ptr,  # (B·H, P, D')
    side, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A token's share of dq̄ of ROWS query blocks (program_id(1) = 0), or of dk̄ and dv̄ of ROWS key blocks."""
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    own, offset, first = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK), head * side
    weight_ptr += first * side
    target = (first + own)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    token_share = 1.0 / tl.maximum(tl.load(count_ptr + first + own), 1.0)
    if tl.program_id(1) == 0:
        sums, share = load_means(sum_ptr, first + own, BLOCK_D), tl.load(share_ptr + first + own)
        grad_q = tl.zeros((ROWS, BLOCK_D), COMPUTE)
        for start in range(0, side, CHUNK):
            y = start + offset
            weights = tl.load(weight_ptr + own[:, None] * side + y[None, :])
            mean_k, mean_v = load_means(mean_k_ptr, first + y, BLOCK_D), load_means(mean_v_ptr, first + y, BLOCK_D)
            reading = product(sums, tl.trans(mean_v), COMPUTE, OPERAND, PRECISION)
            grad_q += product(weights * (reading - share[:, None]), mean_k, COMPUTE, OPERAND, PRECISION)
        tl.store(grad_q_ptr + target, grad_q * (token_share * HEAD_DIM**-0.5)[:, None])
    else:
        mean_v = load_means(mean_v_ptr, first + own, BLOCK_D)
        grad_k, grad_v = tl.zeros((ROWS, BLOCK_D), COMPUTE), tl.zeros((ROWS, BLOCK_D), COMPUTE)
        for start in range(0, side, CHUNK):
            x = start + offset
            weights = tl.trans(tl.load(weight_ptr + x[:, None] * side + own[None, :]))
            mean_q, sums = load_means(mean_q_ptr, first + x, BLOCK_D), load_means(sum_ptr, first + x, BLOCK_D)
            reading = product(mean_v, tl.trans(sums), COMPUTE, OPERAND, PRECISION)
            difference = reading - tl.load(share_ptr + first + x)[None, :]
            grad_k += product(weights * difference, mean_q, COMPUTE, OPERAND, PRECISION)
            grad_v += product(weights, sums, COMPUTE, OPERAND, PRECISION)
        tl.store(grad_k_ptr + target, grad_k * (token_share * HEAD_DIM**-0.5)[:, None])
        tl.store(grad_v_ptr + target, grad_v * token_share[:, None])


@triton.jit
def queries_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    start_ptr, listed_ptr, log_mass_ptr, delta_ptr, coarse_ptr,
    grad_q_ptr, gq_b, gq_h, gq_n,
    length, num_heads, num_blocks, side, budget,
    FULL: tl.constexpr, HAS_MASK: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries: dq_i = τ Σ_j P_ij (do_i·v_j − δ_i) k_j + the share of dq̄."""
    b, h, x = place(tl.program_id(0), num_heads, num_blocks)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    k_ptr += b * k_b + wide_h * k_h
    v_ptr += b * v_b + wide_h * v_h
    mask_ptr += b * mask_b
    offset_n, offset_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    real = real_rows(mask_ptr, mask_n, x * BLOCK, length, offset_n, HAS_MASK)
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, x * BLOCK, offset_n, real, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_ptr + b * grad_b + wide_h * grad_h, grad_n, x * BLOCK, offset_n, real, HEAD_DIM, BLOCK_D)
    row = (head * num_blocks + x) * BLOCK + offset_n
    log_mass, delta = tl.load(log_mass_ptr + row), tl.load(delta_ptr + row)
    listed_ptr, first, last = list_of(start_ptr, listed_ptr, head, x, side, budget)
    grad_q = tl.zeros((BLOCK, BLOCK_D), COMPUTE)
    q, grad = operand(q, BLOCK_D, COMPUTE, OPERAND, PRECISION), operand(grad, BLOCK_D, COMPUTE, OPERAND, PRECISION)
    y = listed_block(listed_ptr, first, last)
    real_y = real_listed(mask_ptr, mask_n, y * BLOCK, length, offset_n, DENSE, HAS_MASK)
    for slot in range(first, last):
        following = listed_block(listed_ptr, slot + 1, last)
        keep = real_y
        k = load_rows(k_ptr, k_n, y * BLOCK, offset_n, keep, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, v_n, y * BLOCK, offset_n, keep, HEAD_DIM, BLOCK_D)
        y = following
        real_y = real_listed(mask_ptr, mask_n, y * BLOCK, length, offset_n, DENSE, HAS_MASK)
        logits = product(q, tl.trans(k), COMPUTE, OPERAND, PRECISION)
        weights = tl.where(keep[None, :], tl.exp2(logits * SCALE - log_mass[:, None]), 0.0)
        reading = product(grad, tl.trans(v), COMPUTE, OPERAND, PRECISION)
        grad_q += product(weights * (reading - delta[:, None]), k, COMPUTE, OPERAND, PRECISION)
    grad_q *= HEAD_DIM**-0.5
    if FULL:
        grad_q += tl.load(coarse_ptr + (head * side + x) * BLOCK_D + offset_d)[None, :]
    inside = x * BLOCK + offset_n < length
    grad_q = tl.where(real[:, None], grad_q, 0.0)
    store_rows(grad_q_ptr + b * gq_b + wide_h * gq_h, gq_n, x * BLOCK, offset_n, inside, grad_q, HEAD_DIM, BLOCK_D)


@triton.jit
def keys_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    start_ptr, listed_ptr, log_mass_ptr, delta_ptr, coarse_k_ptr, coarse_v_ptr,
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    length, num_heads, num_blocks, side, budget,
    FULL: tl.constexpr, HAS_MASK: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys: dv_j = Σ_i P_ij do_i, dk_j = τ Σ_i P_ij (do_i·v_j − δ_i) q_i, + their shares."""
    b, h, y = place(tl.program_id(0), num_heads, num_blocks)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    q_ptr += b * q_b + wide_h * q_h
    grad_ptr += b * grad_b + wide_h * grad_h
    mask_ptr += b * mask_b
    log_mass_ptr += head * num_blocks * BLOCK
    delta_ptr += head * num_blocks * BLOCK
    offset_n, offset_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    real = real_rows(mask_ptr, mask_n, y * BLOCK, length, offset_n, HAS_MASK)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, y * BLOCK, offset_n, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, y * BLOCK, offset_n, real, HEAD_DIM, BLOCK_D)
    listed_ptr, first, last = list_of(start_ptr, listed_ptr, head, y, side, budget)
    grad_k, grad_v = tl.zeros((BLOCK, BLOCK_D), COMPUTE), tl.zeros((BLOCK, BLOCK_D), COMPUTE)
    k, v = operand(k, BLOCK_D, COMPUTE, OPERAND, PRECISION), operand(v, BLOCK_D, COMPUTE, OPERAND, PRECISION)
    x = listed_block(listed_ptr, first, last)
    real_x = real_listed(mask_ptr, mask_n, x * BLOCK, length, offset_n, DENSE, HAS_MASK)
    for slot in range(first, last):
        following = listed_block(listed_ptr, slot + 1, last)
        keep = real_x
        q = load_rows(q_ptr, q_n, x * BLOCK, offset_n, keep, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_ptr, grad_n, x * BLOCK, offset_n, keep, HEAD_DIM, BLOCK_D)
        # Rows of padding may hold anything here: nothing of them is stored.
        log_mass, delta = tl.load(log_mass_ptr + x * BLOCK + offset_n), tl.load(delta_ptr + x * BLOCK + offset_n)
        x = following
        real_x = real_listed(mask_ptr, mask_n, x * BLOCK, length, offset_n, DENSE, HAS_MASK)
        logits = product(k, tl.trans(q), COMPUTE, OPERAND, PRECISION)
        weights = tl.exp2(logits * SCALE - log_mass[None, :])
        grad_v += product(weights, grad, COMPUTE, OPERAND, PRECISION)
        reading = product(v, tl.trans(grad), COMPUTE, OPERAND, PRECISION)
        grad_k += product(weights * (reading - delta[None, :]), q, COMPUTE, OPERAND, PRECISION)
    grad_k *= HEAD_DIM**-0.5
    if FULL:
        row = (head * side + y) * BLOCK_D + offset_d
        grad_k += tl.load(coarse_k_ptr + row)[None, :]
        grad_v += tl.load(coarse_v_ptr + row)[None, :]
    inside = y * BLOCK + offset_n < length
    grad_k, grad_v = tl.where(real[:, None], grad_k, 0.0), tl.where(real[:, None], grad_v, 0.0)
    store_rows(grad_k_ptr + b * gk_b + wide_h * gk_h, gk_n, y * BLOCK, offset_n, inside, grad_k, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr + b * gv_b + wide_h * gv_h, gv_n, y * BLOCK, offset_n, inside, grad_v, HEAD_DIM, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ launches


def summarise(
    out: Tensor, grad: Tensor, key_mask: Tensor | None, log_mass: Tensor, peaks: Tensor, full: bool, block_size: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """δ (B·H, nb · b); with `full` also u (B·H, P, D') and t (B·H, P) by block."""
    batch, heads, length, dim = out.shape
    width, num_blocks, side = block_dim(dim), log_mass.shape[1] // block_size, peaks.shape[1]
    delta = torch.empty_like(log_mass)
    sums, share = delta, delta
    if full:
        sums, share = peaks.new_empty(*peaks.shape, width, dtype=operand_dtype(out.dtype)), torch.empty_like(peaks)
    summarise_kernel[(batch * heads * num_blocks,)](
        out, *strides(out), grad, *strides(grad), *mask_arguments(key_mask, out), log_mass, delta, peaks, sums, share,
        length, heads, num_blocks, side,
        FULL=full, HAS_MASK=key_mask is not None, BLOCK=block_size, HEAD_DIM=dim, BLOCK_D=width,
        COMPUTE=arithmetic(out.dtype)["COMPUTE"], num_warps=max(1, block_size * width // 1024),
    )  # fmt: skip
    return delta, (sums, share)


def coarse_gradients(
    chosen: Selection, summary: tuple[Tensor, Tensor], dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What every token of a block adds to its dq, dk and dv from unrefined pairs, (B·H, P, D') each."""
    sequences, side = chosen.counts.shape
    width = block_dim(dim)
    rows, chunk, warps, stages = COARSE[width]
    rows, chunk = min(rows, side), min(chunk, side)
    grad_q, grad_k, grad_v = chosen.counts.new_empty(3, sequences, side, width)
    coarse_kernel[(sequences * (side // rows), 2)](
        *chosen.means.unbind(), chosen.counts, chosen.weights, *summary, grad_q, grad_k, grad_v, side, side // rows,
        HEAD_DIM=dim, BLOCK_D=width, ROWS=rows, CHUNK=chunk, **arithmetic(dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, log_mass: Tensor,
    state: list[Tensor], full: bool, block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the layout of q, k, v; `state` is the selection of the forward pass."""
    batch, heads, length, dim = q.shape
    chosen, width, num_blocks = Selection(*state), block_dim(dim), log_mass.shape[1] // block_size
    side, budget = chosen.counts.shape[1], chosen.listed.shape[1]
    starts, listed = transpose(chosen)
    delta, summary = summarise(out, grad, key_mask, log_mass, chosen.peaks, full, block_size)
    coarse = coarse_gradients(chosen, summary, dim, q.dtype) if full else (delta,) * 3
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    inputs = (q, *strides(q), k, *strides(k), v, *strides(v), grad, *strides(grad), *mask_arguments(key_mask, q))
    sizes, grid = (length, heads, num_blocks, side, budget), (batch * heads * num_blocks,)
    constants = dict(
        FULL=full, HAS_MASK=key_mask is not None, DENSE=is_dense(length, key_mask, block_size), BLOCK=block_size,
        HEAD_DIM=dim, BLOCK_D=width, **arithmetic(q.dtype),
    )  # fmt: skip
    walk = KEYS[width]
    keys_kernel[grid](
        *inputs, starts, listed, log_mass, delta, coarse[1], coarse[2],
        grad_k, *strides(grad_k), grad_v, *strides(grad_v), *sizes,
        **constants, **walk.options(q.dtype, block_size),
    )  # fmt: skip
    walk = QUERIES[width]
    queries_kernel[grid](
        *inputs, chosen.starts, chosen.listed, log_mass, delta, coarse[0], grad_q, *strides(grad_q), *sizes,
        **constants, **walk.options(q.dtype, block_size),
    )  # fmt: skip
    return grad_q, grad_k, grad_v
