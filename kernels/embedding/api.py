"""Entry to the embedding: plain PyTorch, with a gradient of our own on CUDA."""

import torch
from torch import Tensor
from torch.nn import functional

SMALL = 64
"""Rows of a table up to which the kernel is faster than atomics on an H100: 13 µs against 137 at 32 rows, half of
all tokens padding; 94 against about 50 at 260 rows, inside a compiled Text step."""


def embedding(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows of `table` (rows, dim) by `tokens` (…), any integer dtype: (…, dim), as `torch.nn.functional.embedding`.

    PyTorch's gradient of the table adds row by row with atomics: the order of the sum is chance, and all wait in line
    for the row of the padding. On CUDA ours, G = Σ_n onehot(token_n) gradient_nᵀ, is a matrix product with repeatable
    bits. It is taken for small vocabularies, where it is faster, and for all where deterministic algorithms are asked
    for (`torch.use_deterministic_algorithms`). A gradient that is not finite in one row makes all rows NaN.
    """
    if table.is_cuda and (len(table) <= SMALL or torch.are_deterministic_algorithms_enabled()):
        from kernels.embedding import ops  # Triton is needed only here

        return ops.embedding(tokens, table)
    return functional.embedding(tokens.long(), table)
