"""Bringing the real tokens of all sequences together, without gaps, and back.

`ends` (B·N,) counts the real tokens up to each token, itself included: token t of the batch, where real, goes to row
ends[t] − 1. First come the real tokens of sequence 0, then those of sequence 1, … Traffic: real rows once in, once out.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import block_dim, mask_arguments, strides
from kernels.common.tiles import gather_rows, load_rows, place, real_rows, scatter_rows, store_rows

ROWS = 64


@triton.jit
def pack_kernel(
    x_ptr, mask_ptr, ends_ptr, packed_ptr, num_heads, length, splits, x_b, x_h, x_n, mask_b, mask_n,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The real rows of one tile of a head, to their places."""
    b, h, part = place(tl.program_id(0), num_heads, splits)
    start, offset_n = part * ROWS, tl.arange(0, ROWS)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, True)
    end = tl.load(ends_ptr + b * length + start + offset_n, mask=real, other=1)
    x = load_rows(x_ptr + b * x_b + h * x_h, x_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    scatter_rows(packed_ptr + h * HEAD_DIM, num_heads * HEAD_DIM, end - 1, real, x, HEAD_DIM, BLOCK_D)


@triton.jit
def unpack_kernel(
    packed_ptr, mask_ptr, ends_ptr, x_ptr, num_heads, length, splits, x_b, x_h, x_n, mask_b, mask_n,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All rows of one tile of a head: from their places where real, zero elsewhere."""
    b, h, part = place(tl.program_id(0), num_heads, splits)
    start, offset_n = part * ROWS, tl.arange(0, ROWS)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, True)
    end = tl.load(ends_ptr + b * length + start + offset_n, mask=real, other=1)
    x = gather_rows(packed_ptr + h * HEAD_DIM, num_heads * HEAD_DIM, end - 1, real, HEAD_DIM, BLOCK_D)
    inside = start + offset_n < length
    store_rows(x_ptr + b * x_b + h * x_h, x_n, start, offset_n, inside, x, HEAD_DIM, BLOCK_D)


def pack(x: Tensor, key_mask: Tensor, ends: Tensor, packed: Tensor) -> None:
    """Write the real rows of x (B, H, N, D), unit last stride, to `packed` (B·N, H, D); what follows them stays."""
    _launch(pack_kernel, x, packed, x, key_mask, ends)


def unpack(packed: Tensor, key_mask: Tensor, ends: Tensor) -> Tensor:
    """The converse: (B, H, N, D), laid out as (B, N, H, D), zero where not real, whatever follows the real rows."""
    (batch, length), (heads, dim) = key_mask.shape, packed.shape[1:]
    x = torch.empty(batch, length, heads, dim, dtype=packed.dtype, device=packed.device).transpose(1, 2)
    _launch(unpack_kernel, packed.contiguous(), x, x, key_mask, ends)
    return x


def _launch(kernel, source: Tensor, target: Tensor, x: Tensor, key_mask: Tensor, ends: Tensor) -> None:
    batch, heads, length, dim = x.shape
    mask, *mask_strides = mask_arguments(key_mask, x)
    splits = triton.cdiv(length, ROWS)
    kernel[(batch * heads * splits,)](
        source, mask, ends, target, heads, length, splits, *strides(x), *mask_strides,
        ROWS=ROWS, HEAD_DIM=dim, BLOCK_D=block_dim(dim), num_warps=4,
    )  # fmt: skip
