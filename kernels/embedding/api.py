"""Entry to the embedding: plain PyTorch, with a gradient of our own on CUDA."""

import torch
from torch import Tensor
from torch.nn import functional

SMALL = 512
"""Rows of a table up to which the kernel is taken: every vocabulary of the benchmark, and a bound for its partial sums.
On an H100, of Image's 262,144 tokens, 62 % of them black: 85 µs against 800 for the atomics, which took a fifth of the
whole step without attention; of Text's 131,072, 72 % padding: 48 against 440; of tokens without a favourite 85 and 48
against 122 and 53."""


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
