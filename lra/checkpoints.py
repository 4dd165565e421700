"""The two checkpoints of a cell: where it continues from, and what is tested."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lra.module import CellModule

LAST = "last.ckpt"
BEST = "best.ckpt"


class Checkpoints(Callback):
    """After every validation saves `last.ckpt`, and before it `best.ckpt` if that validation is the best so far.

    Which one is best follows from the curve in the checkpoint, so a run that resumes, wherever its folder lies now,
    decides like one that was never stopped.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, CellModule)
        if best_point(pl_module.curve) is pl_module.curve[-1]:
            trainer.save_checkpoint(self.directory / BEST)
        trainer.save_checkpoint(self.directory / LAST)


def best_point(curve: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of the best validations: a later equal one does not replace a checkpoint."""
    return max(curve, key=lambda point: point["validation_correct"])
