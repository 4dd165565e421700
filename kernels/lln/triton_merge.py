"""The finish of LLN's and AdaMRA's summaries and of their gradients: parts of a sequence merged in fixed order."""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005  (Triton's tuples grow by +; it knows no unpacking)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import arithmetic
from kernels.common.tiles import NEVER

MERGED = 1024
"""Numbers that one program of a merge reads: fewer programs where summaries have few slots."""


@triton.jit
def load_parts(
    peak_ptr, mass_ptr, context_ptr, summary, splits, row,  # slots (B·H·R, splits, …)
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Column maximum, mass and context of the features `row` in every slot of one summary, PARTS at most.

    Parts are not an axis of a tile but tiles of their own: `merge_parts` sums what a thread loaded itself.
    """
    square = row[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    peaks, masses, contexts = (), (), ()
    for s in tl.static_range(PARTS):
        slot, inside = (summary * splits + s) * BLOCK_D, tl.full(row.shape, s, tl.int32) < splits
        peaks = peaks + (tl.load(peak_ptr + slot + row, mask=inside, other=NEVER),)
        masses = masses + (tl.load(mass_ptr + slot + row, mask=inside, other=0.0),)
        contexts = contexts + (tl.load(context_ptr + slot * BLOCK_D + square, mask=inside[:, None], other=0.0),)
    return peaks, masses, contexts


@triton.jit
def merge_parts(
    parts, context_ptr, log_mass_ptr, summary, row,  # of `load_parts`; (B·H·R, D', D'), (B·H·R, 3, D')
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """C and λ of the features `row` of one summary from all its parts."""
    peaks, masses, contexts = parts
    peak = peaks[0]
    for s in tl.static_range(1, PARTS):
        peak = tl.maximum(peak, peaks[s])
    mass, context = tl.zeros_like(peak), tl.zeros_like(contexts[0])
    for s in tl.static_range(PARTS):
        share = tl.exp(peaks[s] - peak)
        mass += share * masses[s]
        context += share[:, None] * contexts[s]
    some = (mass > 0) & (row < HEAD_DIM)
    mass = tl.where(some, mass, 1.0)
    context = tl.where(some[:, None], context / mass[:, None], 0.0)
    log_mass_ptr += summary * 3 * BLOCK_D + row
    tl.store(log_mass_ptr, tl.where(some, peak + tl.log(mass), NEVER))
    tl.store(log_mass_ptr + BLOCK_D, tl.where(some, peak, 0.0))
    tl.store(log_mass_ptr + 2 * BLOCK_D, tl.where(some, 1.0 / mass, 0.0))
    square = row[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(context_ptr + summary * BLOCK_D * BLOCK_D + square, context)


@triton.jit
def merge_summaries_kernel(
    peak_ptr, mass_ptr, context_ptr, out_context_ptr, log_mass_ptr, splits,
    PARTS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """C and λ of ROWS features of one summary from the slots of its parts."""
    summary, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    parts = load_parts(peak_ptr, mass_ptr, context_ptr, summary, splits, row, PARTS, BLOCK_D)
    merge_parts(parts, out_context_ptr, log_mass_ptr, summary, row, PARTS, HEAD_DIM, BLOCK_D)


@triton.jit
def round_gradient(grad_context, shift, context, COMPUTE: tl.constexpr, OPERAND: tl.constexpr):
    """dC of some features as the product that reads it will round it, and their shift with what that cut.

    What a value shares with C_l then drops out of (v' − C_l) · dC_l as it should.
    """
    rounded = grad_context.to(OPERAND).to(COMPUTE)
    return rounded, shift + tl.sum((grad_context - rounded) * context, axis=1)


@triton.jit
def merge_gradients_kernel(
    grad_context_slot_ptr, shift_slot_ptr,  # slots (B·H, R, splits, …)
    context_ptr, mix_ptr,  # (B·H·R, D', D'); (H, D) weights of the output, with HAS_MIX
    grad_context_ptr, shift_ptr, grad_mix_ptr,  # (B·H·R, D', D'), (B·H·R, D'), (B·H, row blocks, D')
    splits, num_heads,
    HAS_MIX: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """dC, and what dk adds to v' dCᵀ, of ROWS features of one summary.

    That is dλ_l − C_l · dC_l = −Σ_i A_il δ_i, because dL = A (do Cᵀ − δ) sums to C_l · dC_l − Σ_i A_il δ_i; it comes
    summed, so that nothing cancels here. With HAS_MIX the slots hold Aᵀ do of the unweighted do: the weights w enter
    here, and dw_d = Σ_l C_ld (Aᵀ do)_ld.
    """
    summary, offset_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    shift, grad_context = tl.zeros((ROWS,), COMPUTE), tl.zeros((ROWS, BLOCK_D), COMPUTE)
    offset = row[:, None] * BLOCK_D + offset_d[None, :]
    for s in tl.static_range(PARTS):
        slot, inside = (summary * splits + s) * BLOCK_D, tl.full(row.shape, s, tl.int32) < splits
        shift += tl.load(shift_slot_ptr + slot + row, mask=inside, other=0.0)
        grad_context += tl.load(grad_context_slot_ptr + slot * BLOCK_D + offset, mask=inside[:, None], other=0.0)
    state = summary * BLOCK_D * BLOCK_D + offset
    context = tl.load(context_ptr + state)
    if HAS_MIX:
        grad_mix = tl.sum(context * grad_context, axis=0)
        block = summary * tl.num_programs(1) + tl.program_id(1)
        tl.store(grad_mix_ptr + block * BLOCK_D + offset_d, grad_mix)
        weight = tl.load(mix_ptr + (summary % num_heads) * HEAD_DIM + offset_d, mask=offset_d < HEAD_DIM, other=0.0)
        grad_context *= weight[None, :]
    grad_context, shift = round_gradient(grad_context, shift, context, COMPUTE, OPERAND)
    tl.store(grad_context_ptr + state, grad_context)
    tl.store(shift_ptr + summary * BLOCK_D + row, shift)


# ------------------------------------------------------------------------------------------------------------ launches


def row_block(width: int, splits: int) -> int:
    """Features that one program of a merge handles: MERGED numbers of all slots, and at least 32 of every slot."""
    return max(1, 32 // width, min(width, MERGED // (width * triton.next_power_of_2(splits))))


def merge_warps(width: int) -> int:
    """Warps of a merge: one, whose threads hold all slots of one number; more where a feature alone is wider."""
    return max(1, width // 32)


class Slots(NamedTuple):
    """Summaries of the parts of every head at every rate, each relative to its own column maximum."""

    peak: Tensor  # (B·H·R, splits, D')
    mass: Tensor  # (B·H·R, splits, D')
    context: Tensor  # (B·H·R, splits, D', D')

    def merged(self) -> tuple[Tensor, Tensor]:
        """Room for the context C (B·H·R, D', D') and the log-mass (B·H·R, 3, D') that they merge into.

        The three are λ, the column maximum of ℓ, and exp(maximum − λ).
        """
        summaries, _, width = self.peak.shape
        return self.context.new_empty(summaries, width, width), self.context.new_empty(summaries, 3, width)


def merge_summaries(slots: Slots, dim: int) -> tuple[Tensor, Tensor]:
    """C and λ, as in `Slots.merged`."""
    summaries, splits, width = slots.peak.shape
    rows, merged = row_block(width, splits), slots.merged()
    merge_summaries_kernel[(summaries, width // rows)](
        *slots, *merged, splits,
        PARTS=triton.next_power_of_2(splits), ROWS=rows, HEAD_DIM=dim, BLOCK_D=width,
        num_warps=merge_warps(width),
    )  # fmt: skip
    return merged


def merge_gradients(
    grad_context: Tensor, shift: Tensor, context: Tensor, mix: Tensor | None, shape: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dC and the shift of every summary from slots (B·H·R, splits, D', …), and the gradient of `mix` (H, D)."""
    batch, heads, _, dim = shape
    summaries, splits, width, _ = grad_context.shape
    kinds, rows = arithmetic(dtype), row_block(width, splits)
    merged, merged_shift = torch.empty_like(context), context.new_empty(context.shape[:2])
    grad_mix = context.new_empty(batch, heads, width // rows, width) if mix is not None else None
    merge_gradients_kernel[(summaries, width // rows)](
        grad_context, shift, context, context if mix is None else mix,
        merged, merged_shift, merged if grad_mix is None else grad_mix, splits, heads,
        HAS_MIX=mix is not None, PARTS=triton.next_power_of_2(splits), ROWS=rows, HEAD_DIM=dim, BLOCK_D=width,
        COMPUTE=kinds["COMPUTE"], OPERAND=kinds["OPERAND"], num_warps=merge_warps(width),
    )  # fmt: skip
    return merged, merged_shift, None if grad_mix is None else grad_mix.sum((0, 2))[:, :dim].contiguous()
