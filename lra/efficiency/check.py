"""Right before fast: a module against float64, at a size that fits, before any of its numbers is taken."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attention import Attention
from lra.efficiency.calls import Inputs, draw, training
from lra.efficiency.cases import Case

LENGTH, TOKENS = 496, 32_768
"""Size of the check: several tiles, blocks and splits of every method and a ragged end, and N × N fits in float64."""


@dataclass(frozen=True)
class Check:
    """Outcome of a check.

    error     largest relative error, ‖mine − exact‖ / ‖exact‖, of output, gradients of q, k, v, and state after a
              training call
    allowed   of it: one unit in the last place of the dtype, which is twice what rounding the exact result costs
    where     which of them had it
    length    tokens of a sequence in the check
    """

    error: float
    allowed: float
    where: str
    length: int

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN never passes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def small(case: Case) -> Case:
    """The case at the size of its check."""
    return replace(case, length=min(case.length, LENGTH), tokens=min(case.tokens, TOKENS))


def check(module: Attention, exact: Attention, case: Case, device: torch.device) -> Check:
    """One training call of `module` at the case's shape and settings against the same of `exact` in float64.

    exact   the plain PyTorch version; it is brought to float64 and to the state of `module`

    A method that chooses (blocks, members, resolutions) may choose differently where candidates tie to rounding; that
    touches so few rows that it stays within what is allowed.
    """
    inputs = draw(small(case), device)
    training(module, inputs)()  # whatever a first training call sets up
    exact.load_state_dict(module.state_dict())
    exact = exact.to(device).double()
    q, k, v = (x.detach().double().requires_grad_() for x in inputs[:3])
    wide = Inputs(q, k, v, inputs.key_mask, inputs.cotangent)
    mine, theirs = training(module, inputs)()[:4], training(exact, wide)()[:4]
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    pairs = zip(mine, theirs, strict=True)
    errors = {name: _error(*(_real(x, inputs) for x in pair)) for name, pair in zip(names, pairs, strict=True)}
    state = exact.state_dict()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            errors[name] = _error(value, state[name])
    where = max(errors, key=lambda name: errors[name])
    return Check(errors[where], torch.finfo(inputs.q.dtype).eps, where, inputs.q.shape[2])


def _real(x: Tensor | None, inputs: Inputs) -> Tensor:
    """x without what padded tokens hold, of which SDPA promises nothing; zeros for a gradient that is none."""
    if x is None:
        return torch.zeros_like(inputs.q)
    if inputs.key_mask is None:
        return x
    return x.masked_fill(~inputs.key_mask[:, None, :, None], 0.0)


def _error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖, infinite where anything is not finite."""
    if not actual.isfinite().all():
        return float("inf")
    error, scale = float((actual.double() - exact).norm()), float(exact.norm())
    return error / scale if scale > 0 else error
