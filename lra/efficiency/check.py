"""Right before fast: a module against float64, at a size that fits, before any of its numbers is taken."""

from dataclasses import asdict, dataclass, replace
from math import inf
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
              training call; or, where that is more, by how much a method that selects prefers what it left out
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

    Of a method that selects (members, blocks) first the selection: it may differ from that of `exact` where candidates
    tie to rounding, and then what it computes is compared on the same selection. AdaMRA's resolutions are not told to
    `exact`: ties touch so few rows that they stay within what is allowed.
    """
    inputs = draw(small(case), device)
    training(module, inputs)()  # whatever a first training call sets up
    exact.load_state_dict(module.state_dict())
    exact = exact.to(device).double()
    q, k, v = (x.detach().double().requires_grad_() for x in inputs[:3])
    wide = Inputs(q, k, v, inputs.key_mask, inputs.cotangent)
    allowed, errors = torch.finfo(inputs.q.dtype).eps, {}
    exact.selected = module.select(inputs.q, inputs.k, inputs.key_mask)
    if exact.selected is not None:
        errors["selection"] = _regret(exact, exact.selected, wide)
        if errors["selection"] > allowed:
            return Check(errors["selection"], allowed, "selection", inputs.q.shape[2])
    mine, theirs = training(module, inputs)()[:4], training(exact, wide)()[:4]
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, *pair in zip(names, mine, theirs, strict=True):
        errors[name] = _error(*(_real(x, inputs) for x in pair))
    state = exact.state_dict()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            errors[name] = _error(value, state[name])
    where = max(errors, key=lambda name: errors[name])
    return Check(errors[where], allowed, where, inputs.q.shape[2])


def _regret(exact: Attention, selected: Tensor, x: Inputs) -> float:
    """By how much, at most, `exact` prefers the i-th best candidate of a row to the i-th best of those selected.

    Infinite for too few or too many of them, for what is no candidate, and for one that is there twice.
    """
    preference, best = exact.preference(*x[:2], x.key_mask), exact.select(*x[:2], x.key_mask)
    if best is None or selected.shape != best.shape or not 0 <= selected.min() <= selected.max() < preference.shape[-1]:
        return inf
    rises, expected = ((index.diff(dim=-1) > 0).sum(-1) for index in (selected, best))
    if not torch.equal(rises, expected):  # only empty slots may repeat
        return inf
    found, best = (preference.gather(-1, index).sort(-1).values for index in (selected, best))
    return float((best - found).abs().max())


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
