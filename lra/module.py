"""The LightningModule of a cell: loss, optimiser, schedule, validation, and the step counter that everything uses."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional

from lra.config import TrainingConfig
from lra.data import DeviceSplit, TrainingOrder
from lra.model import Classifier
from lra.seeding import seed_all
from lra.tasks import TaskData


class LossNotFiniteError(RuntimeError):
    """A loss became NaN or infinite; the message names the step."""


@dataclass
class Score:
    """Integers of a pass over a split, and its mean loss."""

    step: int
    correct: int
    total: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


class CellModule(LightningModule):
    """One cell in Lightning's hands.

    Steps are ours. One call of `training_step` runs a `range` of optimiser steps (one on a CPU, many on a GPU, where
    Lightning's own cost would otherwise exceed the step's), so `self.step`, which lives in the checkpoint, is the
    only counter; Lightning's `global_step` means nothing here. A Lightning epoch is one validation interval: its
    loader yields the ranges from `self.step` to the next validation, so a run that resumes from a checkpoint of any
    epoch continues where it was. Batches and dropout are functions of (seed, step), so it continues bit for bit.
    """

    def __init__(
        self,
        model: Classifier,
        data: TaskData,
        training: TrainingConfig,
        *,
        seed: int,
        precision: str,
        compiled: bool,
        steps_per_call: int,
        selection: str,
    ):
        super().__init__()
        if compiled:
            model.compile(dynamic=False)
        self.automatic_optimization = False
        self.model, self.training_config, self.seed = model, training, seed
        self.precision, self.steps_per_call, self.selection = precision, steps_per_call, selection
        self.data, self.digest = data, data.digest
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.train_seconds = self.train_seconds_before = 0.0  # of all processes of the cell, of those before this one
        self.timed_steps, self.timed_seconds = 0, 0.0
        self._warm = False
        self.on_step = lambda: None  # called after every training step; the progress bar hooks in here

    def setup(self, stage: str) -> None:
        if not hasattr(self, "_splits"):
            self._splits = {name: DeviceSplit(split, self.device) for name, split in self.data.splits.items()}
            size = len(self._splits["train"])
            self._order = TrainingOrder(size, self.training_config.batch_size, self.seed, self.device)

    # Training

    def train_dataloader(self) -> "Intervals":
        return Intervals(self)

    def on_train_epoch_start(self) -> None:
        seed_all(self.seed, "dropout", self.step)
        self._interval_start = (self.step, self._clock())
        self._interval_loss: list[Tensor] = []

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # a range of steps: the data are on the device already

    def training_step(self, steps: range, batch_idx: int) -> None:
        loss = torch.zeros((), device=self.device)
        for step in steps:
            loss += self._optimise(step)
            self.step = step + 1
            self.on_step()
        loss = loss / len(steps)
        if not torch.isfinite(loss):
            raise LossNotFiniteError(f"the training loss became {loss.item()} at or before step {self.step}")
        self._interval_loss.append(loss * len(steps))
        self._log({"train/loss": loss})

    def _optimise(self, step: int) -> Tensor:
        """One optimiser step; returns the cross entropy (without the attention's own loss), detached."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        tokens, labels = self._splits["train"].gather(self._order.indices(step))
        with self._autocast():
            loss = functional.cross_entropy(self.model(tokens).float(), labels)
        optimizer.zero_grad()  # pyright: ignore[reportAttributeAccessIssue]
        self.manual_backward(loss + self.model.auxiliary_loss())
        optimizer.step()  # pyright: ignore[reportAttributeAccessIssue]
        schedule.step()  # pyright: ignore[reportOptionalMemberAccess,reportAttributeAccessIssue,reportCallIssue]
        return loss.detach()

    def _close_interval(self) -> dict[str, float]:
        """The point of the learning curve that the interval's training gives, and its share of the speed."""
        first, started = self._interval_start
        seconds = self._clock() - started
        self.train_seconds += seconds
        if self._warm:  # the first interval of a process also compiles
            self.timed_steps += self.step - first
            self.timed_seconds += seconds
        self._warm = True
        loss = float(torch.stack(self._interval_loss).sum()) / (self.step - first)
        return {"step": self.step, "train_loss": loss, "seconds": self.train_seconds}

    @property
    def steps_per_second(self) -> float | None:
        """Training steps a second, without validation; a process's first interval counts only if there is no other."""
        if self.timed_seconds:
            return self.timed_steps / self.timed_seconds
        return self.step / self.train_seconds if self.train_seconds else None

    # Evaluation

    def val_dataloader(self) -> list[int]:
        return [0]

    def validation_step(self, batch: int, batch_idx: int) -> None:
        point = self._close_interval()
        score = self.evaluate(self.selection)
        point |= {f"validation_{key}": getattr(score, key) for key in ("loss", "correct", "total")}
        self.curve.append(point)
        self._log({"validation/accuracy": score.accuracy, "validation/loss": score.loss})

    def _log(self, metrics: dict[str, Any]) -> None:
        """To the loggers, against our steps: Lightning takes its x-axis from a metric of this name."""
        self.log_dict({**metrics, "step": float(self.step)}, batch_size=1)

    def test_dataloader(self) -> list[int]:
        return [0]

    def test_step(self, batch: int, batch_idx: int) -> None:
        self.test_score = self.evaluate("test")

    @torch.no_grad()
    def evaluate(self, split: str) -> Score:
        """Every item of a split, in batches of the protocol's size; Lightning has put the model into eval mode."""
        correct = torch.zeros((), dtype=torch.long, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for tokens, labels in self._splits[split].batches(self.training_config.batch_size):
            # A short last batch goes through uncompiled: it is not worth a compilation of its own.
            forward = self.model if len(labels) == self.training_config.batch_size else self.model.forward
            with self._autocast():
                logits = forward(tokens).float()
            correct += (logits.argmax(-1) == labels).sum()
            loss += functional.cross_entropy(logits, labels, reduction="sum")
        total = len(self._splits[split])
        mean = float(loss) / total
        if not math.isfinite(mean):
            raise LossNotFiniteError(f"the {split} loss is {mean} at step {self.step}")
        return Score(step=self.step, correct=int(correct), total=total, loss=mean)

    # Optimiser, precision, state

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.training_config
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=config.learning_rate,
            total_steps=config.steps,
            pct_start=config.warmup_steps / config.steps,
            anneal_strategy="linear",
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _autocast(self) -> AbstractContextManager:
        # One context a step, not one a Lightning call: autocast keeps its bf16 copies of the weights until it exits.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["cell"] = {"digest": self.digest, **{key: getattr(self, key) for key in STATE}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key in STATE:
            setattr(self, key, checkpoint["cell"][key])
        self.train_seconds_before = self.train_seconds


STATE = ("step", "curve", "train_seconds", "timed_steps", "timed_seconds")
"""What a checkpoint holds of a `CellModule` beside weights, optimiser and schedule."""


class Intervals:
    """The loader of one Lightning epoch: the steps up to the next validation, as ranges of `steps_per_call`."""

    def __init__(self, module: CellModule):
        self.module = module

    def _bounds(self) -> tuple[int, int]:
        config, step = self.module.training_config, self.module.step
        return step, min(config.steps, (step // config.validate_every + 1) * config.validate_every)

    def __len__(self) -> int:
        start, stop = self._bounds()
        return -(-(stop - start) // self.module.steps_per_call)

    def __iter__(self) -> Iterator[range]:
        start, stop = self._bounds()
        for first in range(start, stop, self.module.steps_per_call):
            yield range(first, min(stop, first + self.module.steps_per_call))
