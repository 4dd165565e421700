"""The attention matrix of any attention, without asking the method for it."""

import copy

import torch
from torch import Tensor

from attention import Attention

LINEARITY = 1e-8
"""Largest relative error, in float64, between a module's output and its own matrix times the values."""


def double_copy(module: Attention) -> Attention:
    """A float64 copy of `module` in eval mode on its reference implementation.

    Measuring on the copy leaves the module as it was: its mode, running statistics, centroids, auxiliary loss.
    """
    twin = copy.deepcopy(module).double().eval()
    twin.impl = "reference"
    return twin


@torch.no_grad()
def attention_matrix(module: Attention, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """P with module(q, k, v) = P v for every v, found by feeding the columns of the identity as values.

    q, k, key_mask   as in a call of the module, (B, H, N, D) and (B, N)
    returns          (B, H, N, N) float64; rows of padded queries and columns of padded keys are zero. Rows need
                     not sum to one: AdaMRA scales them by its gate, Routing leaves unassigned queries at zero

    Costs ⌈N / D⌉ + 1 calls, on a float64 copy in eval mode. One call more, on random values, checks that P
    explains the module; ValueError if not (not linear in v, or weights that differ between value channels).
    """
    twin = double_copy(module)
    q, k = q.double(), k.double()
    batch, heads, length, dim = q.shape
    matrix = q.new_empty(batch, heads, length, length)
    for start in range(0, length, dim):
        channel = torch.arange(min(dim, length - start), device=q.device)
        identity = torch.zeros_like(q)
        identity[:, :, start + channel, channel] = 1
        matrix[..., start + channel] = twin(q, k, identity, key_mask)[..., channel]

    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(q.shape, generator=generator, dtype=torch.float64).to(q.device)
    explained, actual = matrix @ probe, twin(q, k, probe, key_mask)
    error = torch.linalg.vector_norm(explained - actual)
    if not error <= LINEARITY * torch.linalg.vector_norm(actual):  # also refuses NaN
        raise ValueError(
            f"{type(module).__name__} has no attention matrix: it is not linear in v, "
            "or its weights differ between the value channels"
        )
    return matrix
