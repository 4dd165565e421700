"""Right before fast: what the check of an attention passes, and what it refuses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from efficiency import build, case
from torch import Tensor

import attention
from attention import Attention
from lra.efficiency.check import check

CPU = torch.device("cpu")


class Off(Attention):
    """softmax, wrong by `factor` where `rows` says."""

    def __init__(self, factor: float, rows: slice = slice(None)):
        super().__init__(2, 32, 2048)
        self.inner, self.factor, self.rows = build("softmax", 2048), factor, rows

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        out = self.inner(q, k, v, key_mask)
        changed = torch.zeros_like(out)
        changed[:, :, self.rows] = 1.0
        return out * (1 + (self.factor - 1) * changed)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["lln", "mra", "adamra", "routing", "softmax"])
def test_a_right_module_passes(name: str, masked: bool):
    one = case(name, length=200, masked=masked)
    outcome = check(build(name, 200), build(name, 200), one, CPU)
    assert outcome.passed, outcome
    assert outcome.error > 0  # bf16 is no float64


@pytest.mark.parametrize(("factor", "rows"), [(1.02, slice(None)), (2.0, slice(-1, None)), (math.nan, slice(5, 6))])
def test_a_wrong_module_fails(factor: float, rows: slice):
    assert check(Off(1.0), Off(1.0), case("softmax", 200), CPU).passed
    outcome = check(Off(factor, rows), Off(1.0), case("softmax", 200), CPU)
    assert not outcome.passed


class WrongGradient(torch.autograd.Function):
    """x, whose gradient is 5 % too large."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 1.05 * gradient


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_wrong_gradient_fails(which: str):
    class Module(Off):
        def attend(self, q, k, v, key_mask):
            inputs = {"q": q, "k": k, "v": v}
            inputs[which] = WrongGradient.apply(inputs[which])
            return super().attend(*inputs.values(), key_mask)

    outcome = check(Module(1.0), Off(1.0), case("softmax", 200), CPU)
    assert not outcome.passed
    assert outcome.where == f"gradient of {which}"


def test_a_wrong_state_fails():
    class Module(type(build("routing"))):
        def _update(self, counts, sums):
            super()._update(2 * counts, sums)

    sizes = dict(num_heads=2, head_dim=32, max_length=200)
    exact = attention.build("routing", **sizes, decay=0.5)
    outcome = check(Module(**sizes, decay=0.5), exact, case("routing", 200), CPU)
    assert not outcome.passed
    same = check(*(attention.build("routing", **sizes, decay=0.5) for _ in range(2)), case("routing", 200), CPU)
    assert same.passed


# Selections first, then values on the same selection

NEAR = torch.finfo(torch.bfloat16).eps
CHOICES = {"routing": dict(num_clusters=8, window=20), "mra": dict(block_size=16, blocks_per_row=2)}


def choosing(name: str) -> Attention:
    return attention.build(name, num_heads=2, head_dim=32, max_length=200, **CHOICES[name])


def exchanging(name: str, change: Callable[[Tensor, Tensor], Tensor], tells: bool = True) -> Attention:
    """`name` that attends to what `change` makes of its selection and of the preference, and tells so or does not."""

    class Module(type(choosing(name))):
        def changed(self, *x: Any) -> Tensor:
            return change(super().select(*x), self.preference(*x))

        def select(self, *x: Any) -> Tensor | None:
            return self.changed(*x) if tells else None

        def attend(self, q, k, v, key_mask):
            self.selected = self.changed(q, k, key_mask)
            return super().attend(q, k, v, key_mask)

    return Module(num_heads=2, head_dim=32, max_length=200, **CHOICES[name])


def exchanged(own: Tensor, preference: Tensor, by: int) -> Tensor:
    """The worst selected candidate of each row exchanged for the one `by` places behind it."""
    order, last = preference.argsort(-1, descending=True), own.shape[-1] - 1
    return torch.cat([order[..., :last], order[..., [last + by]]], -1).sort(-1).values


def tied(own: Tensor, preference: Tensor) -> Tensor:
    """Exchanged for the next one where both are equal but for rounding."""
    other = exchanged(own, preference, by=1)
    found, best = (preference.gather(-1, index).sum(-1, keepdim=True) for index in (other, own))
    return other.where(best - found < NEAR, own)


@pytest.mark.parametrize("name", CHOICES)
def test_ties_may_go_to_either_and_values_are_compared_on_the_same_selection(name: str):
    assert check(exchanging(name, tied), choosing(name), case(name, 200), CPU).passed
    apart = check(exchanging(name, tied, tells=False), choosing(name), case(name, 200), CPU)
    assert not apart.passed, "on a selection of its own the exact one differs by more than rounding"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(
    "change",
    [
        lambda own, preference: exchanged(own, preference, by=30),
        lambda own, preference: exchanged(own, preference.masked_fill(preference == preference.amin(), 9.0), by=0),
        lambda own, preference: own[..., 1:],
        lambda own, preference: own[..., [0, *range(own.shape[-1] - 1)]],
        lambda own, preference: own + preference.shape[-1],
    ],
    ids=["worse", "worst", "too few", "twice", "nothing"],
)
def test_a_wrong_selection_is_refused_before_any_value(name: str, masked: bool, change):
    module = choosing(name)
    right = module.select
    module.select = lambda *x: change(right(*x), module.preference(*x))
    outcome = check(module, choosing(name), case(name, 200, masked), CPU)
    assert not outcome.passed
    assert outcome.where == "selection"


@pytest.mark.parametrize("name", CHOICES)
def test_a_wrong_value_on_a_right_selection_is_refused(name: str):
    module = choosing(name)
    attend = module.attend
    module.attend = lambda *x: 1.02 * attend(*x)
    outcome = check(module, choosing(name), case(name, 200), CPU)
    assert not outcome.passed
    assert outcome.where != "selection"
