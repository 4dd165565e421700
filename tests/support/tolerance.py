"""One rule for every numerical tolerance: no worse than twice plain PyTorch in the same dtype."""

import torch
from torch import Tensor

EXACT = 1e-10
"""Relative tolerance of two float64 computations of one formula."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; the absolute error where the expected value is zero."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = torch.linalg.vector_norm(expected)
    error = torch.linalg.vector_norm(actual - expected)
    return float(error / scale) if scale > 0 else float(error)


def assert_exact(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Two float64 computations of one formula agree to 1e-10; NaN never passes."""
    error = relative_error(actual, expected)
    assert error <= EXACT, f"{what}: relative error {error:.3e} > {EXACT:.0e}"


def assert_as_good_as(actual: Tensor, plain: Tensor, exact: Tensor, what: str = "") -> None:
    """`actual` is at most twice as far from the float64 value as plain PyTorch is in the same dtype.

    The floor of one unit in the last place, averaged over a tensor, covers a `plain` that happens to be exact.
    """
    allowed = 2 * max(relative_error(plain, exact), torch.finfo(actual.dtype).eps / 2)
    error = relative_error(actual, exact)
    assert error <= allowed, f"{what}: relative error {error:.3e} > {allowed:.3e}, twice that of plain PyTorch"
