"""Arrays to batches: a split lives on the device as it is stored, and a step gathers its rows there."""

import torch
from torch import Tensor

from lra.seeding import derive_seed
from lra.tasks import Split


class DeviceSplit:
    """One split on a device, uint8 or int16 as stored."""

    def __init__(self, split: Split, device: torch.device):
        self.tokens = torch.tensor(split.tokens, device=device)
        self.labels = torch.tensor(split.labels, device=device).long()

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) or (B, 2, N) as stored, and labels (B,), int64, of the items `index` (B,)."""
        return self.tokens[index], self.labels[index]


class TrainingOrder:
    """Which items step s trains on: an endless stream of seeded permutations, cut into batches.

    Depends on (seed, step, batch_size, size) alone, so that a resumed run sees the same batches. Every item comes
    once a pass; a batch may straddle two passes.

    There are no batches of equal length. In four widths a batch of ListOps would shrink to 0.62 of its tokens, one of
    reviews to 0.44, which saves at most 2 of the 5 seconds, and 18 of the 35, that a cell without attention trains on
    an H100. But every width is a shape of its own, and compiling three more takes 45 seconds, 12 with warm caches;
    and the order of a protocol would be another.
    """

    def __init__(self, size: int, batch_size: int, seed: int, device: torch.device):
        self.size, self.batch_size, self.seed, self.device = size, batch_size, seed, device
        self._passes: dict[int, Tensor] = {}

    def write(self, step: int, out: Tensor) -> None:
        """Put the item indices of the step into `out` (batch_size,), int64, on the device."""
        first, done = step * self.batch_size, 0
        while done < self.batch_size:
            epoch, start = divmod(first + done, self.size)
            part = self._permutation(epoch)[start : start + self.batch_size - done]
            out[done : done + len(part)] = part
            done += len(part)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._passes:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            order = torch.randperm(self.size, generator=generator).to(self.device)
            self._passes = {k: v for k, v in self._passes.items() if k == epoch - 1} | {epoch: order}
        return self._passes[epoch]
