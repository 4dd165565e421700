"""MRA-2 and MRA-2-s in Triton: the forward pass over the refined pairs, and how lists of blocks are walked.

With b tokens a block, m refined pairs and nb blocks in each of B·H heads, a call costs

    forward    5 touches of one (B, H, N, D) tensor (pool: q, k, v; attend: q, out), 2 m b D numbers of k, v gathered
    selection  nb² scores a head (triton_select): 1, 4, 17 MB at N = 1024, 4096, 16384 of the table, written once, read
               once, and twice more where there are over 128 blocks; half of that once more for the coarse weights
    backward   9 touches, 4 m b D numbers of q, do, k, v gathered (triton_backward): 7 products of m tiles b × b × D

so that at 8 blocks of 32 a row the 65,536 tiles of the table decide: 0.27 GB gathered and 67 million exponentials in
each of three passes. A program owns one block of queries (in the backward pass also of keys) and walks its list: every
sum has one owner and one order. Its own tiles stay in registers; the index of the next block, and which of its tokens
are real, are read a step ahead, or the gathers would wait for them and could not be kept in flight.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import arithmetic, block_dim, mask_arguments, state_dtype, strides
from kernels.common.tiles import LOG2E, NEVER, load_rows, place, product, real_rows, store_rows, widened
from kernels.mra.triton_lists import select

UNSEEN = tl.constexpr(1e30)
"""Log-mass of a query that sees no key, and of padding: it takes every weight to zero."""


class Walk(NamedTuple):
    """How a pass over lists of blocks is launched: warps of a program, stages of the loads.

    registers   of a thread, at most, for bf16 in blocks of up to 32 tokens (else it would spill); 0: no limit.
                Programs are short and wait for their gathers, so that many should be resident
    """

    warps: int
    stages: int
    registers: int = 0

    def options(self, dtype: torch.dtype, block_size: int) -> dict[str, int]:
        capped = self.registers > 0 and dtype == torch.bfloat16 and block_size <= 32
        limit = dict(maxnreg=self.registers) if capped else {}
        return dict(num_warps=self.warps, num_stages=self.stages, **limit)


# By padded head dimension.
ATTEND = {16: Walk(1, 3), 32: Walk(1, 3, 144), 64: Walk(2, 3), 128: Walk(4, 3)}


@triton.jit
def list_of(start_ptr, listed_ptr, head, block, side, budget):
    """The lists of a head, the first slot of the list of `block` in them, and the slot behind its last."""
    bound = start_ptr + head * (side + 1) + block
    return listed_ptr + head * budget, tl.load(bound), tl.load(bound + 1)


@triton.jit
def listed_block(listed_ptr, slot, last):
    """The block listed at `slot`, 0 behind the end of the list."""
    return tl.load(listed_ptr + slot, mask=slot < last, other=0)


@triton.jit
def real_listed(mask_ptr, mask_n, start, length, offset_n, DENSE: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which tokens of a listed block count; with DENSE all, which costs the loads no mask."""
    if DENSE:
        return tl.full(offset_n.shape, True, tl.int1)
    else:
        return real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK)


@triton.jit
def operand(x, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of a program's own block, in registers for the products of all its steps."""
    return widened(x, BLOCK_D, COMPUTE, OPERAND, PRECISION).to(OPERAND)


@triton.jit
def attend_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    start_ptr, listed_ptr, coarse_peak_ptr, coarse_mass_ptr, coarse_sum_ptr,
    out_ptr, out_b, out_h, out_n,
    log_mass_ptr, length, num_heads, num_blocks, side, budget,
    FULL: tl.constexpr, HAS_MASK: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log₂ of the mass of one block of queries: from the coarse sums on, one streaming softmax."""
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
    listed_ptr, first, last = list_of(start_ptr, listed_ptr, head, x, side, budget)
    peak, mass = tl.full((BLOCK,), NEVER, COMPUTE), tl.zeros((BLOCK,), COMPUTE)
    total = tl.zeros((BLOCK, BLOCK_D), COMPUTE)
    if FULL:
        row = head * side + x
        peak = tl.zeros((BLOCK,), COMPUTE) + tl.load(coarse_peak_ptr + row)
        mass += tl.load(coarse_mass_ptr + row)
        total += tl.load(coarse_sum_ptr + row * BLOCK_D + offset_d)[None, :]
    q = operand(q, BLOCK_D, COMPUTE, OPERAND, PRECISION)
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
        logits = tl.where(keep[None, :], logits, -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1) * SCALE)
        weights = tl.exp2(logits * SCALE - higher[:, None])
        scale = tl.exp2(peak - higher)
        mass = mass * scale + tl.sum(weights, axis=1)
        total = total * scale[:, None] + product(weights, v, COMPUTE, OPERAND, PRECISION)
        peak = higher
    seen = real & (mass > 0)
    mass = tl.where(seen, mass, 1.0)
    out = total * tl.where(seen, 1.0 / mass, 0.0)[:, None]
    keep_n = x * BLOCK + offset_n < length
    store_rows(out_ptr + b * out_b + wide_h * out_h, out_n, x * BLOCK, offset_n, keep_n, out, HEAD_DIM, BLOCK_D)
    tl.store(log_mass_ptr + (head * num_blocks + x) * BLOCK + offset_n, tl.where(seen, peak + tl.log2(mass), UNSEEN))


# ------------------------------------------------------------------------------------------------------------ launches


def is_dense(length: int, key_mask: Tensor | None, block_size: int) -> bool:
    """Whether every token of every block is real."""
    return key_mask is None and length % block_size == 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
    full: bool, block_size: int, budget: int, first_blocks: int, diagonal_blocks: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output (B, H, N, D), laid out as (B, N, H, D), log₂ of the masses (B·H, nb · b), then the selection."""
    batch, heads, length, dim = q.shape
    width, num_blocks = block_dim(dim), triton.cdiv(length, block_size)
    chosen, coarse = select(q, k, v, key_mask, full, block_size, budget, first_blocks, diagonal_blocks)
    out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    log_mass = torch.empty(batch * heads, num_blocks * block_size, dtype=state_dtype(q.dtype), device=q.device)
    walk = ATTEND[width]
    attend_kernel[(batch * heads * num_blocks,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask_arguments(key_mask, q), chosen.starts, chosen.listed,
        chosen.peaks, *coarse, out, *strides(out), log_mass, length, heads, num_blocks, chosen.counts.shape[1], budget,
        FULL=full, HAS_MASK=key_mask is not None, DENSE=is_dense(length, key_mask, block_size), BLOCK=block_size,
        HEAD_DIM=dim, BLOCK_D=width, **arithmetic(q.dtype), **walk.options(q.dtype, block_size),
    )  # fmt: skip
    return out, log_mass, *chosen
