"""The gradient of a table look-up as a product with one-hot rows that are made in registers.

Traffic: the gradient once for every block of ROWS table rows that occurs in a part of the tokens (once, where all are
of 256 symbols), and PARTS · rows · dim partial sums written and read. The products take the gradient apart into
bfloat16 pieces, whose sum has the 24 bits of a float32; one-hot rows are exact, so nothing is lost but by the order of
a float32 sum.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import INTERPRETED, block_dim

PARTS = 132
"""Programs that share the tokens: one for each of an H100's multiprocessors."""

TILE = 64
"""Tokens of one product."""

SCAN = 1024
"""Tokens looked at once to see whether a block of table rows occurs among them."""


@triton.jit
def table_gradient_kernel(
    gradient_ptr, tokens_ptr, partial_ptr, count, chunk, rows, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, SCAN: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Sums of the gradients of one part of the tokens, for one block of table rows."""
    part, block = tl.program_id(0), tl.program_id(1)
    row, column = block * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    total = tl.zeros((ROWS, DIM), tl.float32)
    first = part.to(tl.int64) * chunk
    stop = tl.minimum(first + chunk, count)
    met = 0
    for start in range(first, stop, SCAN):
        place = start + tl.arange(0, SCAN)
        token = tl.load(tokens_ptr + place, mask=place < stop, other=-1).to(tl.int32)
        inside = (place < stop) & (token >= block * ROWS) & (token < block * ROWS + ROWS)
        met = tl.maximum(met, tl.max(inside.to(tl.int32)))
    first = tl.where(met > 0, first, stop)  # no token of this block: nothing to add
    for start in range(first, stop, TILE):
        place = start + tl.arange(0, TILE)
        token = tl.load(tokens_ptr + place, mask=place < stop, other=-1)
        inside = (place < stop)[:, None] & (column < dim)[None]
        rest = tl.load(gradient_ptr + place[:, None] * dim + column[None], mask=inside, other=0.0).to(tl.float32)
        one_hot = (row[:, None] == token[None]).to(PIECE)
        for _ in tl.static_range(PIECES):
            piece = rest.to(PIECE)
            total = tl.dot(one_hot, piece, total, input_precision="ieee")
            rest -= piece.to(tl.float32)
    at = (part * rows + row)[:, None].to(tl.int64) * dim + column[None]
    tl.store(partial_ptr + at, total, mask=(row < rows)[:, None] & (column < dim)[None])


def table_gradient(gradient: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """Σ_n onehot(tokens_n) gradient_nᵀ: gradient (n, dim) contiguous, tokens (n,) → (rows, dim), in its dtype."""
    count, dim = gradient.shape
    block = min(256, max(16, triton.next_power_of_2(rows)))
    chunk = triton.cdiv(triton.cdiv(max(1, count), PARTS), TILE) * TILE
    parts = triton.cdiv(max(1, count), chunk)
    partial = torch.empty(parts, rows, dim, dtype=torch.float32, device=gradient.device)
    table_gradient_kernel[(parts, triton.cdiv(rows, block))](
        gradient, tokens, partial, count, chunk, rows, dim,
        ROWS=block, DIM=block_dim(dim), TILE=TILE, SCAN=SCAN, num_warps=8 if block > 64 else 4, num_stages=3,
        PIECE=tl.float32 if INTERPRETED else tl.bfloat16, PIECES=1 if INTERPRETED else 3,
    )  # fmt: skip
    return partial.sum(0).to(gradient.dtype)
