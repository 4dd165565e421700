"""Right before fast: a module against float64, at a size that fits, before any of its numbers is taken."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attention import Attention
from lra.efficiency.calls import Inputs, draw, training
from lra.efficiency.cases import CHOOSING, Case

LENGTH = 1008
"""Tokens of the check: many tiles and blocks of every method and a ragged end, small enough for N × N in float64."""

SEQUENCES = 2

CHOOSING_ROWS = 0.05
"""Largest share of rows at which a method that chooses may have chosen differently."""


@dataclass(frozen=True)
class Check:
    """Outcome of a check.

    error     largest relative error of output, gradients of q, k, v and state after a training call
    allowed   of it: one unit in the last place of the dtype, twice the rounding of a plain PyTorch version
    where     which of them had it
    left_out  share of rows left out of it, where the method chooses
    """

    error: float
    allowed: float
    where: str
    left_out: float
    length: int

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN never passes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def check(module: Attention, exact: Attention, case: Case, device: torch.device) -> Check:
    """One training call of `module` at the case's shape and settings against the same of `exact` in float64.

    exact   the plain PyTorch version; it is brought to float64 and to the state of `module`
    """
    length = min(case.length, LENGTH)
    small = replace(case, length=length, tokens=SEQUENCES * length)
    inputs = draw(small, device)
    training(module, inputs)()  # whatever a first training call sets up
    exact.load_state_dict(module.state_dict())
    exact = exact.to(device).double()
    wide = Inputs(*(x.detach().double().requires_grad_() for x in inputs[:3]), inputs.key_mask, inputs.cotangent)
    mine, theirs = training(module, inputs)()[:4], training(exact, wide)()[:4]
    left_out = CHOOSING_ROWS if case.attention in CHOOSING else 0.0
    pairs = list(zip(("output", "gradient of q", "gradient of k", "gradient of v"), mine, theirs, strict=True))
    errors = {name: _error(_real(a, inputs), _real(b, inputs), left_out) for name, a, b in pairs}
    state = exact.state_dict()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            errors[name] = _error(value, state[name], left_out)
    where = max(errors, key=lambda name: errors[name])
    return Check(errors[where], torch.finfo(inputs.q.dtype).eps, where, left_out, length)


def _real(x: Tensor | None, inputs: Inputs) -> Tensor:
    """x without what padded tokens hold, of which SDPA promises nothing; zeros for a gradient that is none."""
    if x is None:
        return torch.zeros_like(inputs.q)
    if inputs.key_mask is None:
        return x
    return x.masked_fill(~inputs.key_mask[:, None, :, None], 0.0)


def _error(actual: Tensor, exact: Tensor, left_out: float) -> float:
    """‖actual − exact‖ / ‖exact‖ without the `left_out` worst rows; infinite where anything is not finite."""
    if not actual.isfinite().all():
        return float("inf")
    difference = (actual.detach().double() - exact.detach()).flatten()
    if actual.dim() > 1 and left_out:
        rows = difference.unflatten(0, (-1, actual.shape[-1])).norm(dim=-1)
        difference = rows.sort().values[: len(rows) - int(left_out * len(rows))]
    scale = float(exact.norm())
    error = float(difference.norm())
    return error / scale if scale > 0 else error
