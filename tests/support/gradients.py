"""Comparison of all gradients of two computations of one thing."""

import torch
from inputs import padding
from tolerance import EXACT
from torch import Tensor

ROUNDING = 1e-14
"""Error, relative to the whole gradient, of a leaf whose terms cancel: of k, for one, when there is one token."""


def assert_same_gradients(actual: Tensor, expected: Tensor, leaves: dict[str, Tensor]) -> None:
    """The float64 scalars `actual` and `expected` have the same gradient in each of `leaves`; NaN never passes."""
    gradients, wanted = (
        torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True) for loss in (actual, expected)
    )
    whole = torch.cat([g.flatten() for g in wanted]).norm()
    for name, got, want in zip(leaves, gradients, wanted, strict=True):
        error, allowed = (got - want).norm(), EXACT * want.norm() + ROUNDING * whole
        assert error <= allowed, f"gradient of {name}: error {error:.3e} > {allowed:.3e}"


def assert_compiles_whole(module: torch.nn.Module, inputs: list[Tensor]) -> None:
    """torch.compile takes `module` without a graph break and changes no output or gradient, with a mask or without."""
    compiled, (batch, _, length, _) = torch.compile(module, fullgraph=True), inputs[0].shape
    for mask in (None, padding(batch, length).to(inputs[0].device)):
        expected, actual = module(*inputs, mask), compiled(*inputs, mask)
        torch.testing.assert_close(actual, expected)
        gradients = (torch.autograd.grad(x.square().sum(), inputs) for x in (actual, expected))
        for mine, other in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, other)
