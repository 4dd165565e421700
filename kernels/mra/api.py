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
    selection: Tensor | None = None,
) -> Tensor:
    """MRA attention: exact where the mass is, at block resolution ("full") or not at all ("sparse") elsewhere.

        o_i = [ Σ_{y ∈ I_x} Σ_{j ∈ y} e^{τ q_i·k_j} v_j  +  Σ_{y ∉ I_x} c_y e^{τ q̄_x·k̄_y} v̄_y ]
              / [ the same without v ],                      i in block x,  τ = 1/√D

    q̄, k̄, v̄ are the means of a block's real tokens, c_y their number; "sparse" drops the second sum. The
    refined pairs (x, y) ∈ I are the blocks_per_row · ⌈N / block_size⌉ highest of a head: by priors, then by
    τ q̄_x·k̄_y less its maximum over y. Arguments and result as in `attention.base.Attention`; a `selection`, which only
    the reference takes, says I as `select` does.

    Zeng et al., "Multi Resolution Analysis (MRA) for Approximate Self-Attention" (arXiv 2207.10284): MRA-2 and
    MRA-2-s. One budget a head, the row normalisation and the priors are those of the authors' code; unlike there,
    the budget follows the length of the call, row maxima ignore padding, and sums are exact instead of + 1e-6.
    """
    check_options(mode, block_size, blocks_per_row, first_blocks, diagonal_blocks)
    options = dict(
        block_size=block_size, blocks_per_row=blocks_per_row, first_blocks=first_blocks, diagonal_blocks=diagonal_blocks
    )
    refusal = None if selection is None else "chooses the blocks itself"
    if choose_impl(impl, q, IMPLEMENTATIONS, "mra", refusal) == "triton":
        from kernels.mra import ops  # Triton is needed only here

        return ops.mra_attention(q, k, v, key_mask, mode=mode, **options)
    out = reference.mra_attention(q, k, v, key_mask, mode=mode, **options, selection=selection)
    return heads_last(out, key_mask, q.dtype)


def select(q: Tensor, k: Tensor, key_mask: Tensor | None = None, *, impl: str = "auto", **options: int) -> Tensor:
    """The refined pairs of a call, (B, H, m) int64: x · nb + y, ascending; `options` are all that decide it."""
    if choose_impl(impl, q, IMPLEMENTATIONS, "mra") == "triton":
        from kernels.mra import ops

        return ops.select_blocks(q, k, key_mask, **options)
    return reference.select_blocks(q, k, key_mask, **options)


def preference(
    q: Tensor, k: Tensor, key_mask: Tensor | None = None, *, block_size: int, first_blocks: int, diagonal_blocks: int
) -> Tensor:
    """Of which `select` takes the largest, (B, H, nb²): priors, plus the score between −1 and 0 in each head."""
    priors, scores = reference.rank_blocks(
        q, k, key_mask, block_size=block_size, first_blocks=first_blocks, diagonal_blocks=diagonal_blocks
    )
    lowest = scores.amin((-2, -1), keepdim=True).clamp_max(-1e-30)
    return (priors - scores / lowest).flatten(-2)
