"""MRA attention as a function: options checked, implementation chosen."""

from torch import Tensor

from kernels.common.dispatch import choose_impl
from kernels.common.inputs import check_choice, check_positive
from kernels.common.layout import heads_last
from kernels.mra import reference

IMPLEMENTATIONS = ("reference", "triton")
MODES = ("full", "sparse")  # MRA-2, MRA-2-s
BLOCK_SIZES = (16, 32, 64)


def check_options(mode: str, block_size: int, blocks_per_row: int, first_blocks: int, diagonal_blocks: int) -> None:
    """Raise ValueError, in one line, for an option that MRA does not have."""
    check_choice(MODES, mode=mode)
    check_positive(block_size=block_size, blocks_per_row=blocks_per_row)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"attention.block_size={block_size} is not supported; MRA takes 16, 32 or 64")
    for name, value in (("first_blocks", first_blocks), ("diagonal_blocks", diagonal_blocks)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"attention.{name}={value!r} must be an integer >= 0; 0 turns the prior off")


def mra_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    mode: str = "full",
    block_size: int = 32,
    blocks_per_row: int = 8,
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    impl: str = "auto",
) -> Tensor:
    """MRA attention: exact where the mass is, at block resolution ("full") or not at all ("sparse") elsewhere.

        o_i = [ Σ_{y ∈ I_x} Σ_{j ∈ y} e^{τ q_i·k_j} v_j  +  Σ_{y ∉ I_x} c_y e^{τ q̄_x·k̄_y} v̄_y ]
              / [ the same without v ],                      i in block x,  τ = 1/√D

    q̄, k̄, v̄ are the means of a block's real tokens, c_y their number; "sparse" drops the second sum. The
    refined pairs (x, y) ∈ I are the blocks_per_row · ⌈N / block_size⌉ highest of a head: by priors, then by
    τ q̄_x·k̄_y less its maximum over y. Arguments and result as in `attention.base.Attention`.

    Zeng et al., "Multi Resolution Analysis (MRA) for Approximate Self-Attention" (arXiv 2207.10284): MRA-2 and
    MRA-2-s. One budget a head, the row normalisation and the priors are those of the authors' code; unlike there,
    the budget follows the length of the call, row maxima ignore padding, and sums are exact instead of + 1e-6.
    """
    check_options(mode, block_size, blocks_per_row, first_blocks, diagonal_blocks)
    chosen = choose_impl(impl, q, IMPLEMENTATIONS, "mra")
    if chosen == "triton":
        from kernels.mra import ops  # Triton is needed only here

        attend = ops.mra_attention
    else:
        attend = reference.mra_attention
    out = attend(
        q,
        k,
        v,
        key_mask,
        mode=mode,
        block_size=block_size,
        blocks_per_row=blocks_per_row,
        first_blocks=first_blocks,
        diagonal_blocks=diagonal_blocks,
    )
    return out if chosen == "triton" else heads_last(out, key_mask, q.dtype)
