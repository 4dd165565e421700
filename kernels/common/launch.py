"""What the launch of any kernel has to settle: dtypes of arithmetic, tile widths, and how work is split."""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528
"""Most programs of a pass over tokens, as far as it can choose: four for each of an H100's 132 multiprocessors."""

MAX_SPLITS = 64
"""Slots of partial sums that one program of a reduction reads at once."""

COUNTS = ("splits", "num_batches", "tiles", "leaves")
"""Arguments of kernels that count programs or tiles, for `do_not_specialize_on_alignment`: whether 16 divides them
changes with the length but not the program, which would be compiled twice."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
"""Kernels run on the CPU, for tests. Triton settles it when a kernel is defined, so it holds for the process."""


class Config(NamedTuple):
    """How a pass over tokens is launched: rows of a tile, warps of a program, stages of the load pipeline.

    `registers` is the most that a thread may hold, where fewer than it would like let more programs run side by side.
    """

    rows: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        limit = {} if self.registers is None else dict(maxnreg=self.registers)
        return dict(num_warps=self.warps, num_stages=self.stages, **limit)

    def fit(self, rates: tuple[int, ...]) -> "Config":
        """The same with tiles at least as long as every window, which must lie in one."""
        return self._replace(rows=max(self.rows, *rates))


def block_dim(head_dim: int) -> int:
    """Columns of a tile: the head dimension, padded to what a matrix product on the hardware takes."""
    return max(16, triton.next_power_of_2(head_dim))


def arithmetic(dtype: torch.dtype) -> dict:
    """Compile-time constants of the arithmetic for inputs of `dtype`.

    COMPUTE     what sums, exponents and accumulators are in
    OPERAND     what enters a matrix product. bf16 inputs multiply as bf16. fp16 inputs multiply as fp32, in three
                products of tf32: sums over a sequence would overflow fp16, and tf32 alone, which cuts where fp16
                rounds, is worse than plain PyTorch by more than a factor of two
    PRECISION   of the product where OPERAND is fp32
    """
    if dtype == torch.bfloat16:
        return dict(COMPUTE=tl.float32, OPERAND=tl.bfloat16, PRECISION="tf32")
    if dtype == torch.float16:
        return dict(COMPUTE=tl.float32, OPERAND=tl.float32, PRECISION="tf32x3")
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    return dict(COMPUTE=compute, OPERAND=compute, PRECISION="ieee")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partial sums and saved states are stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split(length: int, tile: int, sequences: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """Parts of a sequence that run side by side, and tokens in each, a multiple of `tile`.

    All parts of all sequences are `programs` at most, so that they run at once: a few more would take twice as long.
    A function of the shape alone, so that the order of every sum, and with it every bit, repeats.
    """
    tiles = triton.cdiv(length, tile)
    parts = min(tiles, MAX_SPLITS, max(1, programs // sequences))
    chunk = triton.cdiv(tiles, parts) * tile
    return triton.cdiv(length, chunk), chunk


def unit_last_stride(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, else a copy; an expanded gradient, for one, has stride 0."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of (B, H, N) of a (B, H, N, D) tensor."""
    return x.stride(0), x.stride(1), x.stride(2)


def mask_arguments(key_mask: Tensor | None, placeholder: Tensor) -> tuple[Tensor, int, int]:
    """Pointer and strides of a key mask; without one, any pointer, which is never read."""
    if key_mask is None:
        return placeholder, 0, 0
    return key_mask.view(torch.uint8), key_mask.stride(0), key_mask.stride(1)
