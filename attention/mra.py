"""Multi Resolution Analysis attention (arXiv 2207.10284)."""

from torch import Tensor

from attention.base import Attention
from attention.registry import register
from kernels.mra import IMPLEMENTATIONS, check_options, mra_attention, preference, select


@register("mra", mra_s={"mode": "sparse"})
class MRA(Attention):
    """MRA-2 (`mode="full"`) and MRA-2-s (`mode="sparse"`): the largest blocks exact, the rest coarse or dropped.

    The formula stands in `kernels.mra.api.mra_attention`. No parameters.

    mode              "full": unrefined blocks count through their means | "sparse": not at all
    block_size        16, 32 (published) or 64 tokens
    blocks_per_row    refined blocks per query block on average; a head spends blocks_per_row · ⌈N / block_size⌉
    first_blocks      that many block rows and columns at the start are refined first; 0: none
    diagonal_blocks   block diagonals refined first, in pairs around the main one: 1 → 1, 2 and 3 → 3; 0: none

    A query may get no refined block: "full" then attends through the means only, "sparse" gives zeros.
    """

    implementations = IMPLEMENTATIONS

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_length: int,
        causal: bool = False,
        impl: str = "auto",
        mode: str = "full",
        block_size: int = 32,
        blocks_per_row: int = 8,
        first_blocks: int = 0,
        diagonal_blocks: int = 0,
    ):
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        if causal:
            raise ValueError("attention.causal=True is refused by mra: a block's mean query would leak the future")
        check_options(mode, block_size, blocks_per_row, first_blocks, diagonal_blocks)
        self.mode, self.block_size, self.blocks_per_row = mode, block_size, blocks_per_row
        self.first_blocks, self.diagonal_blocks = first_blocks, diagonal_blocks

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return mra_attention(
            q, k, v, key_mask, mode=self.mode, **self._choice(), impl=self.impl, selection=self.selected
        )

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """The refined pairs of blocks, see `kernels.mra.api.select`."""
        return select(q, k, key_mask, **self._choice(), impl=self.impl)

    def preference(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        options = self._choice()
        del options["blocks_per_row"]
        return preference(q, k, key_mask, **options)

    def _choice(self) -> dict[str, int]:
        names = ("block_size", "blocks_per_row", "first_blocks", "diagonal_blocks")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, mode={self.mode!r}, block_size={self.block_size}, "
            f"blocks_per_row={self.blocks_per_row}, first_blocks={self.first_blocks}, "
            f"diagonal_blocks={self.diagonal_blocks}"
        )
