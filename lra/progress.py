"""What a person sees while a cell trains: one bar in a terminal, a line now and then in a log file."""

import logging
import time
import warnings

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lra.module import CellModule

SECONDS_BETWEEN_LINES = 10.0


def quieten_lightning() -> None:
    """Silence Lightning's start-up notes and the warnings that our use of it makes pointless."""
    for part in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(part).setLevel(logging.ERROR)
    known = ("Checkpoint directory", ".*does not have many workers", ".*LeafSpec", "Experiment logs directory")
    for about in (*known, "The `srun` command is available"):
        warnings.filterwarnings("ignore", message=about)


class TrainingProgress(Callback):
    """Steps done, loss, last validation accuracy, time left."""

    def __init__(self, label: str, console: Console | None = None):
        self.label = label
        self.console = console or Console()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._last_line = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, CellModule)
        self.module = pl_module
        self.steps = pl_module.training_config.steps
        self.task = self.bar.add_task(self.label, total=self.steps, completed=pl_module.step, state="")
        self.bar.start()
        pl_module.on_step = self._on_step

    def _on_step(self) -> None:
        self.bar.update(self.task, completed=self.module.step)
        self._line("")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.update(self.task, state="validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        point = self.module.curve[-1]
        accuracy = 100 * point["validation_correct"] / point["validation_total"]
        state = f"loss {point['train_loss']:.3f}, {self.module.validation_split} {accuracy:.1f} %"
        self.bar.update(self.task, completed=self.module.step, state=state)
        self._line(f", {state}", at_once=self.module.step == self.steps)

    def _line(self, state: str, at_once: bool = False) -> None:
        """In a log file: one line, not too often."""
        due = time.monotonic() > self._last_line + SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and (due or at_once):
            self._last_line = time.monotonic()
            self.console.print(f"{self.label}: step {self.module.step}/{self.steps}{state}", soft_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.bar.stop()
