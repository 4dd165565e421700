"""Traps for kernels that touch memory they do not own, or leave memory they own untouched."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from inputs import qkv
from torch import Tensor

BAND = 1024
"""Elements of NaN on either side of a guarded buffer."""


def guarded(x: Tensor) -> Tensor:
    """x, same values, shape and strides, inside a buffer with NaN on either side."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    buffer = torch.full((extent + 2 * BAND,), torch.nan, dtype=x.dtype, device=x.device)
    inside = buffer.as_strided(x.shape, x.stride(), BAND)
    return inside.copy_(x)


def guarded_qkv(
    batch: int, heads: int, length: int, dim: int, mask: Tensor | None, device: torch.device
) -> list[Tensor]:
    """Float32 leaves q, k, v (B, H, N, D), views of one guarded (B, N, 3, H, D) as a fused projection makes them.

    Padding may hold anything: here NaN.
    """
    fused = torch.stack(qkv(batch, heads, length, dim, dtype=torch.float32)).permute(1, 3, 0, 2, 4).contiguous()
    fused = guarded(fused.to(device))
    if mask is not None:
        fused[~mask.to(device)] = torch.nan
    return [fused[:, :, i].transpose(1, 2).detach().requires_grad_() for i in range(3)]


@contextmanager
def guarded_allocations() -> Iterator[list[tuple[Tensor, int]]]:
    """Inside, torch.empty, new_empty and empty_like give float buffers poisoned with NaN between bands of NaN.

    On leaving, a band that was written to is an assertion error. Every element that a kernel forgets stays NaN.
    """
    buffers: list[tuple[Tensor, int]] = []
    plain_empty, plain_like = torch.empty, torch.empty_like

    def poisoned(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        buffer = torch.full((extent + 2 * BAND,), torch.nan, dtype=dtype, device=device)
        buffers.append((buffer, extent))
        return buffer.as_strided(shape, stride, BAND)

    def like(x: Tensor, **options) -> Tensor:
        model = plain_like(x, **options)
        return poisoned(model.shape, model.stride(), model.dtype, model.device) if model.is_floating_point() else model

    def empty(*shape, **options) -> Tensor:
        return like(plain_empty(*shape, **options))

    def new_empty(self: Tensor, *shape, **options) -> Tensor:
        return empty(*shape, **{"dtype": self.dtype, "device": self.device, **options})

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", like),
        mock.patch.object(Tensor, "new_empty", new_empty),
    ):
        yield buffers
    for buffer, extent in buffers:
        assert buffer[:BAND].isnan().all(), "a kernel wrote before its buffer"
        assert buffer[BAND + extent :].isnan().all(), "a kernel wrote behind its buffer"
