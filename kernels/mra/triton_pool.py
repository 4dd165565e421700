"""The means q̄, k̄, v̄ of every block, and how many of its tokens are real: one touch of q, k, v.

The choice of pairs takes q̄ and k̄ as they were summed; products of values take all three as operands, in 16 bits or not.

nb blocks are padded to P, so that no tile of pairs is cut; the blocks behind the last hold no real token.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import arithmetic, block_dim, mask_arguments, state_dtype, strides
from kernels.common.tiles import load_rows, place, real_rows


def padded(blocks: int) -> int:
    """P: a power of two of at least 32, or a multiple of 512."""
    return max(32, triton.next_power_of_2(blocks)) if blocks <= 512 else triton.cdiv(blocks, 512) * 512


@triton.jit
def fill_rows(ptr, value, first, last, WIDTH: tl.constexpr):
    """`value` in the rows first … last − 1 of a (…, WIDTH) buffer."""
    for start in range(first, last, 32):
        row = start + tl.arange(0, 32)
        position = ptr + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(position, tl.full((32, WIDTH), value, ptr.dtype.element_ty), mask=(row < last)[:, None])


@triton.jit
def block_mean(
    ptr, stride_n, start, offset_n, real, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr
):
    """Sum of the real rows of a block, times `scale`."""
    rows = load_rows(ptr, stride_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    return tl.sum(rows.to(COMPUTE), axis=0) * scale


@triton.jit
def pool_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    mean_ptr, operand_ptr, count_ptr, stride, length, num_heads, num_blocks, side,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Means of one block, and its number of real tokens; zeros behind the last block."""
    b, h, block = place(tl.program_id(0), num_heads, num_blocks)
    wide_h = h.to(tl.int64)
    offset_n, offset_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    start = block * BLOCK
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK)
    count = tl.sum(tl.where(real, 1.0, 0.0).to(COMPUTE))
    scale = 1.0 / tl.maximum(count, 1.0)
    mean_q = block_mean(q_ptr + b * q_b + wide_h * q_h, q_n, start, offset_n, real, scale, HEAD_DIM, BLOCK_D, COMPUTE)
    mean_k = block_mean(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, scale, HEAD_DIM, BLOCK_D, COMPUTE)
    mean_v = block_mean(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, scale, HEAD_DIM, BLOCK_D, COMPUTE)
    first = (b * num_heads + h) * side
    position = (first + block) * BLOCK_D + offset_d
    tl.store(count_ptr + first + block, count)
    tl.store(mean_ptr + position, mean_q)
    tl.store(mean_ptr + stride + position, mean_k)
    tl.store(operand_ptr + position, mean_q)
    tl.store(operand_ptr + stride + position, mean_k)
    tl.store(operand_ptr + 2 * stride + position, mean_v)
    if block == num_blocks - 1:
        fill_rows(count_ptr + first, 0.0, num_blocks, side, 1)
        for part in tl.static_range(2):
            fill_rows(mean_ptr + part * stride + first * BLOCK_D, 0.0, num_blocks, side, BLOCK_D)
        for part in tl.static_range(3):
            fill_rows(operand_ptr + part * stride + first * BLOCK_D, 0.0, num_blocks, side, BLOCK_D)


@triton.jit
def load_means(ptr, row, BLOCK_D: tl.constexpr):
    """Rows of (…, D') means or sums of blocks."""
    return tl.load(ptr + row[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])


# ------------------------------------------------------------------------------------------------------------ launches


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """What `arithmetic` multiplies inputs of `dtype` in."""
    return dtype if dtype == torch.bfloat16 else state_dtype(dtype)


def pool(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of q, k (2, B·H, P, D'), of q, k, v as operands (3, B·H, P, D'), and counts of real tokens (B·H, P)."""
    batch, heads, length, dim = q.shape
    num_blocks = triton.cdiv(length, block_size)
    side = padded(num_blocks)
    sequences, width = batch * heads, block_dim(dim)
    means = torch.empty(2, sequences, side, width, dtype=state_dtype(q.dtype), device=q.device)
    operands = torch.empty(3, sequences, side, width, dtype=operand_dtype(q.dtype), device=q.device)
    counts = means.new_empty(sequences, side)
    pool_kernel[(batch * heads * num_blocks,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask_arguments(key_mask, q), means, operands, counts,
        means.stride(0), length, heads, num_blocks, side,
        HAS_MASK=key_mask is not None, BLOCK=block_size, HEAD_DIM=dim, BLOCK_D=width,
        COMPUTE=arithmetic(q.dtype)["COMPUTE"], num_warps=max(1, block_size * width // 1024),
    )  # fmt: skip
    return means, operands, counts
