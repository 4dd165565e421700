"""MRA's launches as operators, and their gradient."""

import torch
from torch import Tensor

from kernels.common.launch import block_dim, state_dtype, unit_last_stride
from kernels.common.ops import refuse_create_graph, register_op
from kernels.mra import triton, triton_backward, triton_lists
from kernels.mra.triton_lists import weights_like
from kernels.mra.triton_pool import operand_dtype, padded


def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
    full: bool, block_size: int, budget: int, first_blocks: int, diagonal_blocks: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, heads, length, dim = q.shape
    sequences, blocks, dtype = batch * heads, -(-length // block_size), state_dtype(q.dtype)
    side, whole = padded(blocks), torch.int32
    counts = q.new_empty(sequences, side, dtype=dtype)
    return (
        q.new_empty(batch, length, heads, dim).transpose(1, 2),
        q.new_empty(sequences, blocks * block_size, dtype=dtype),
        q.new_empty(3, sequences, side, block_dim(dim), dtype=operand_dtype(q.dtype)),
        counts,
        q.new_empty(sequences, side // 32, side, dtype=whole),
        q.new_empty(sequences, side // 32, dtype=whole),
        q.new_empty(sequences, side + 1, dtype=whole),
        q.new_empty(sequences, budget, dtype=whole),
        counts.new_empty(sequences, side),
        weights_like(counts, q.dtype, full),
    )


def _run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, log_mass: Tensor,
    means: Tensor, counts: Tensor, bits: Tensor, words: Tensor, starts: Tensor, listed: Tensor,
    peaks: Tensor, weights: Tensor, full: bool, block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    state = [means, counts, bits, words, starts, listed, peaks, weights]
    return triton_backward.backward(grad, q, k, v, key_mask, out, log_mass, state, full, block_size)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask"
_STATE = (
    "Tensor means, Tensor counts, Tensor bits, Tensor words, Tensor starts, Tensor listed, Tensor peaks, Tensor weights"
)
_RESULTS = ", ".join(["Tensor"] * 10)
forward = register_op(
    "mra_forward",
    f"({_INPUTS}, bool full, int block_size, int budget, int first_blocks, int diagonal_blocks) -> ({_RESULTS})",
    triton.forward,
    _forward,
)
backward = register_op(
    "mra_backward",
    f"(Tensor grad, {_INPUTS}, Tensor out, Tensor log_mass, {_STATE}, bool full, int block_size) "
    "-> (Tensor, Tensor, Tensor)",
    _run_backward,
    _backward,
)


class _MRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_mask, full, block_size, budget, first_blocks, diagonal_blocks):
        out, *state = forward(q, k, v, key_mask, full, block_size, budget, first_blocks, diagonal_blocks)
        ctx.save_for_backward(q, k, v, key_mask, out, *state)
        ctx.options = (full, block_size)
        return out

    @staticmethod
    def backward(ctx, *grads):
        refuse_create_graph()
        return *backward(unit_last_stride(grads[0]), *ctx.saved_tensors, *ctx.options), *([None] * 6)


def mra_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *,
    mode: str, block_size: int, blocks_per_row: int, first_blocks: int, diagonal_blocks: int,
) -> Tensor:  # fmt: skip
    """`kernels.mra.api.mra_attention` through the kernels."""
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    budget = _budget(q.shape[2], block_size, blocks_per_row)
    return _MRA.apply(q, k, v, key_mask, mode == "full", block_size, budget, first_blocks, diagonal_blocks)


def select_blocks(
    q: Tensor, k: Tensor, key_mask: Tensor | None, *, block_size: int, blocks_per_row: int, first_blocks: int,
    diagonal_blocks: int,
) -> Tensor:  # fmt: skip
    """`kernels.mra.reference.select_blocks` through the kernels."""
    q, k = (unit_last_stride(x) for x in (q, k))
    budget = _budget(q.shape[2], block_size, blocks_per_row)
    chosen, _ = triton_lists.select(q, k, k, key_mask, False, block_size, budget, first_blocks, diagonal_blocks)
    num_blocks = -(-q.shape[2] // block_size)
    pairs = owners(chosen.starts, chosen.listed) * num_blocks + chosen.listed
    return filled(pairs, chosen.starts[:, -1:], num_blocks**2).view(*q.shape[:2], budget)


def owners(starts: Tensor, listed: Tensor) -> Tensor:
    """The block whose list each slot of `listed` belongs to, (B·H, m) int64."""
    slot = torch.arange(listed.shape[1], device=listed.device, dtype=starts.dtype).expand(listed.shape)
    return torch.searchsorted(starts, slot.contiguous(), right=True) - 1


def filled(pairs: Tensor, number: Tensor, total: int) -> Tensor:
    """The first `number` (B·H, 1) of `pairs` (B·H, m), then the lowest of all `total` that are not among them; sorted.

    The kernels list pairs with real tokens on both sides alone; where those are fewer than m, the others are refined
    by name.
    """
    slot = torch.arange(pairs.shape[1], device=pairs.device)
    pairs = pairs.where(slot < number, total)
    among = torch.zeros(len(pairs), total + 1, dtype=torch.bool, device=pairs.device).scatter(1, pairs, True)
    others = among[:, :total].byte().argsort(stable=True).gather(1, (slot - number).clamp(min=0))
    return pairs.where(slot < number, others).sort(-1).values


def _budget(length: int, block_size: int, blocks_per_row: int) -> int:
    num_blocks = -(-length // block_size)
    return min(blocks_per_row * num_blocks, num_blocks**2)
