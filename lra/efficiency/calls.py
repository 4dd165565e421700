"""Calls that are measured: their inputs, and forward or forward + backward of a module on them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attention import Attention
from lra.efficiency.cases import Case

Call = Callable[[], list[Tensor | None]]
"""Runs once and returns all that it made, so that nothing of it is freed while its memory is measured."""


class Inputs(NamedTuple):
    """q, k, v (B, H, N, D), leaves with a gradient; key_mask (B, N) or None; the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    cotangent: Tensor


def draw(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
    """Gaussian q, k, v and output gradient of a case, the same in every run; the gradient of padding is zero.

    With a mask, the sequences' lengths are spread evenly over N/2 … N: a quarter of the tokens is padding.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, case.heads, case.length, case.head_dim)
    kind = dtype or getattr(torch, case.dtype)
    q, k, v, cotangent = (torch.randn(shape, generator=generator, device=device).to(kind) for _ in range(4))
    mask = suffix_padding(case.batch, case.length, device) if case.masked else None
    if mask is not None:
        cotangent = cotangent.masked_fill(~mask[:, None, :, None], 0.0)
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), mask, cotangent)


def suffix_padding(batch: int, length: int, device: torch.device) -> Tensor:
    """(B, N) bool, True = real; real lengths at the middles of B equal parts of N/2 … N."""
    middles = (torch.arange(batch, device=device) + 0.5) / batch
    lengths = (length / 2 * (1 + middles)).ceil()
    return torch.arange(length, device=device) < lengths[:, None]


def inference(module: Attention, x: Inputs) -> Call:
    """Forward alone, in evaluation mode."""

    def call() -> list[Tensor | None]:
        module.eval()
        with torch.no_grad():
            return [module(x.q, x.k, x.v, x.key_mask)]

    return call


def training(module: Attention, x: Inputs) -> Call:
    """Forward and backward in training mode: output, then gradients of q, k, v and of the parameters, None for zero.

    The loss is that of training: the output against the given gradient, and the method's own.
    """
    parameters, one = list(module.parameters()), torch.ones((), device=x.q.device)

    def call() -> list[Tensor | None]:
        module.train()
        out = module(x.q, x.k, x.v, x.key_mask)
        losses, gradients = [out], [x.cotangent.to(out.dtype)]
        auxiliary = module.auxiliary_loss()
        if auxiliary.requires_grad:
            losses, gradients = [out, auxiliary], [gradients[0], one.to(auxiliary.dtype)]
        leaves = [x.q, x.k, x.v, *parameters]
        found = torch.autograd.grad(losses, leaves, gradients, allow_unused=True)
        return [out.detach(), *found]  # detached: who keeps the result does not keep its graph

    return call
