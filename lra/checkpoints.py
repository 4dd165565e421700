"""The two checkpoints of a cell: where it continues from, and what is tested."""

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lra.module import CellModule

LAST = "last.ckpt"
BEST = "best.ckpt"
SECONDS_BETWEEN_SAVES = 10.0


class Checkpoints(Callback):
    """After a validation saves `last.ckpt`, which is `best.ckpt` too if that validation is the best so far.

    Which one is best follows from the curve in the checkpoint, so a run that resumes, wherever its folder lies now,
    decides like one that was never stopped. Where validations follow each other within seconds, one that is not the
    best leaves no file: a run that is killed repeats at most `SECONDS_BETWEEN_SAVES` and an interval.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.saved_step = 0  # of `last.ckpt`, which a later run continues from; 0 without one
        self._saved_at = -math.inf

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, CellModule)
        best = best_point(pl_module.curve, pl_module.selection) is pl_module.curve[-1]
        last = pl_module.step == pl_module.training_config.steps
        due = best or last or time.monotonic() > self._saved_at + SECONDS_BETWEEN_SAVES
        if not trainer.strategy.broadcast(due):  # all ranks take part in a save, and clocks differ
            return
        self._save(trainer, best)
        self.saved_step, self._saved_at = pl_module.step, time.monotonic()

    def _save(self, trainer: Trainer, best: bool) -> None:
        """Whole or not at all, also where the disk is full: Lightning copies into place from another disk.

        One save makes both files: had `best.ckpt` been replaced without `last.ckpt`, the run would continue from before
        the best validation, and where it is not repeatable to the bit might never see that one again.
        """
        last, second = (self.directory / f".{name}.tmp" for name in (LAST, BEST))
        try:
            if trainer.is_global_zero:  # who alone writes
                _remove(last, second)  # of a process that was killed; one may be another name of `best.ckpt`
            trainer.save_checkpoint(last)
            if trainer.is_global_zero:
                if best:
                    _name_twice(last, second)
                    os.replace(second, self.directory / BEST)
                os.replace(last, self.directory / LAST)
            trainer.strategy.barrier("renamed")
        except BaseException:
            _remove(last, second)
            raise


def _name_twice(file: Path, name: Path) -> None:
    """Give a file another name; a copy where the file system has no such names."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def _remove(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def best_point(curve: Sequence[dict[str, Any]], selection: str) -> dict[str, Any]:
    """The first of the best validations: a later equal one does not replace a checkpoint.

    With selection "last" it is the last: protocols whose papers report the last checkpoint validate only for the curve.
    """
    if selection == "last":
        return curve[-1]
    return max(curve, key=lambda point: point["validation_correct"])
