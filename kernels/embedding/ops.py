"""The gradient of a table look-up as an operator."""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.common.ops import refuse_create_graph, register_op
from kernels.embedding import triton


def _gradient(gradient: Tensor, tokens: Tensor, rows: int) -> Tensor:
    return gradient.new_empty(rows, gradient.shape[-1])


table_gradient = register_op(
    "embedding_table_gradient",
    "(Tensor gradient, Tensor tokens, int rows) -> Tensor",
    triton.table_gradient,
    _gradient,
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, table):
        ctx.save_for_backward(tokens)
        ctx.rows = len(table)
        return functional.embedding(tokens.long(), table)

    @staticmethod
    def backward(ctx, *grads):
        refuse_create_graph()
        (tokens,) = ctx.saved_tensors
        gradient = grads[0].reshape(-1, grads[0].shape[-1]).contiguous()
        return None, table_gradient(gradient, tokens.reshape(-1), ctx.rows)


def embedding(tokens: Tensor, table: Tensor) -> Tensor:
    """`kernels.embedding.api.embedding` with the gradient through the kernel."""
    return _Embedding.apply(tokens, table)
