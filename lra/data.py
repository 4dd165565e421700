"""Arrays to batches: a split lives on the device as it is stored, and a step gathers its rows there."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lra.seeding import derive_seed
from lra.tasks import Split

Batch = tuple[Tensor, Tensor]
"""Tokens (B, N) or (B, 2, N), int64, 0 = padding; labels (B,), int64."""


class DeviceSplit:
    """One split on a device, uint8 or int16 as stored."""

    def __init__(self, split: Split, device: torch.device):
        self.tokens = torch.tensor(split.tokens, device=device)
        self.labels = torch.tensor(split.labels, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor) -> Batch:
        return self.tokens[index].long(), self.labels[index].long()

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every item once, in the stored order; the last batch may be short."""
        for index in torch.arange(len(self), device=self.labels.device).split(batch_size):
            yield self.gather(index)


class TrainingOrder:
    """Which items step s trains on: an endless stream of seeded permutations, cut into batches.

    Depends on (seed, step, batch_size, size) alone, so that a resumed run sees the same batches. Every item comes
    once a pass; a batch may straddle two passes.
    """

    def __init__(self, size: int, batch_size: int, seed: int, device: torch.device):
        self.size, self.batch_size, self.seed, self.device = size, batch_size, seed, device
        self._passes: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """Item indices (batch_size,) of the step, on the device."""
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while first < last:
            epoch, start = divmod(first, self.size)
            stop = min(self.size, start + last - first)
            parts.append(self._permutation(epoch)[start:stop])
            first += stop - start
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._passes:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            order = torch.randperm(self.size, generator=generator).to(self.device)
            self._passes = {k: v for k, v in self._passes.items() if k == epoch - 1} | {epoch: order}
        return self._passes[epoch]
