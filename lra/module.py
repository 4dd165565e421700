"""The LightningModule of a cell: loss, optimiser, schedule, validation, and the step counter that everything uses."""

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional

from lra.capture import Captured
from lra.config import TrainingConfig
from lra.data import DeviceSplit, TrainingOrder
from lra.model import Classifier
from lra.ranks import average_gradients
from lra.schedules import build_schedule
from lra.seeding import seed_all
from lra.tasks import TaskData

MIB = 2**20


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


@dataclass(frozen=True)
class Origin:
    """What a process trains with. Its checkpoints keep it: the next process may have other code, or another machine.

    code          digest of the code
    computed_by   implementation of the attention and precision: a cell has one
    device        of which speed and memory are measured, as in the record
    """

    code: str
    computed_by: str
    device: dict[str, Any]


class CellModule(LightningModule):
    """One cell in Lightning's hands.

    Steps are ours. One call of `training_step` runs a `range` of optimiser steps (one on a CPU, many on a GPU, where
    Lightning's own cost would otherwise exceed the step's), so `self.step`, which lives in the checkpoint, is the
    only counter; Lightning's `global_step` means nothing here. A Lightning epoch is one validation interval: its
    loader yields the ranges from `self.step` to the next validation, so a run that resumes from a checkpoint of any
    epoch continues where it was. Batches and dropout are functions of (seed, step), so it continues bit for bit.

    On several devices each rank trains on its part of every batch, so that the batch is the protocol's, with dropout
    of its own; gradients are averaged inside the step, losses and counts when they are read. Validation batches are
    dealt out whole. So all is as on one device, but for attentions whose statistics are those of the call (LLN, AdaMRA:
    of a rank's part, as with `accumulate`); Routing's centroids follow the queries and keys of all ranks.
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
        accumulate: int,
        selection: str,
        origin: Origin,
        bare_steps: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.training_config, self.seed = model, training, seed
        self.precision, self.steps_per_call, self.selection = precision, steps_per_call, selection
        self.validation_split = "validation" if selection == "last" else selection
        self.data, self.digest, self.origin = data, data.digest, origin
        self.processes, self.codes = 1, [origin.code]  # that have trained the cell
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.train_seconds = self.train_seconds_before = 0.0  # of all processes of the cell, of those before this one
        self.timed_steps, self.timed_seconds = 0, 0.0
        self.elsewhere = (0, 0.0)  # steps and seconds of training on other devices
        self.peak_mem_mib = self.data_mem_mib = 0.0  # of all processes on this device; of the data, which lie on a GPU
        self.compile_seconds = 0.0  # of this process, outside train_seconds
        self.set_up_at: float | None = None  # on the clock of `time.perf_counter`: where all ranks had come together
        self.first_step_at: float | None = None
        self.bare_steps, self.bare_steps_per_second = bare_steps, None
        self._compiled, self._accumulate, self._warm = compiled, accumulate, False
        self.on_step = lambda: None  # called after every training step; the progress bar hooks in here

    def setup(self, stage: str) -> None:
        self.set_up_at = self.set_up_at or time.perf_counter()
        if not hasattr(self, "_splits"):
            self._place()
        # Anew for every call of fit or test: Lightning has moved the weights to the CPU and back in between, so that
        # they need not lie where a graph would look for them.
        captures = self._compiled and self.trainer.strategy.root_device.type == "cuda"
        pool = torch.cuda.graph_pool_handle() if captures else None

        def step(function: Callable[[], None]) -> Callable[[], None]:
            return Captured(function, pool) if captures else function

        self._train_batch = step(self._train)
        self._score_batch = {name: step(partial(self._score, name)) for name in self._splits}

    def _place(self) -> None:
        """Put the data on the device, and what a captured step reads and writes, at fixed addresses."""
        self._splits = {name: DeviceSplit(split, self.device) for name, split in self.data.splits.items()}
        if self.device.type == "cuda":
            self.data_mem_mib = sum(a.nbytes for split in self.data.splits.values() for a in split) / MIB
        batch_size = self.training_config.batch_size
        self._order = TrainingOrder(len(self._splits["train"]), batch_size, self.seed, self.device)
        self._index = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        self._part = self._index.chunk(self.trainer.world_size)[self.global_rank]  # of a training batch, a view
        self._counts = torch.zeros(batch_size, dtype=torch.bool, device=self.device)
        self._loss = torch.zeros((), device=self.device)
        self._eval_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._eval_correct = torch.zeros((), dtype=torch.long, device=self.device)
        # The class of each test item, zero for those of other ranks; one place more takes those that do not count.
        self._predicted = torch.zeros(len(self._splits["test"]) + 1, dtype=torch.long, device=self.device)
        torch._dynamo.reset()  # what other cells of this process compiled would count against its limit
        self._objective = torch.compile(objective, dynamic=False) if self._compiled else objective

    # Training

    def train_dataloader(self) -> "Intervals":
        return Intervals(self)

    def on_train_start(self) -> None:
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # pyright: ignore[reportAttributeAccessIssue]
            if torch.is_tensor(group["lr"]):  # read from a checkpoint it lies on the CPU, where a replay never looks
                group["lr"] = group["lr"].to(self.device)

    def on_train_epoch_start(self) -> None:
        own = () if self.global_rank == 0 else (self.global_rank,)
        seed_all(self.seed, "dropout", self.step, *own)
        self._interval_start = (self.step, self._clock(), self.compile_seconds)
        self._interval_losses: list[tuple[int, int, Tensor]] = []  # of each call: last step, steps, sum of losses

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # a range of steps: the data are on the device already

    def training_step(self, steps: range, batch_idx: int) -> None:
        # Nothing here waits for the device: it works through its queue while Lightning turns to the next call.
        self._loss.zero_()
        for step in steps:
            self._optimise(step)
            self.step = step + 1
            self.on_step()
        self._interval_losses.append((self.step, len(steps), self._loss.clone()))

    def _optimise(self, step: int) -> None:
        """One optimiser step. All that the host does for it: name the batch, start the graph, move the rate."""
        self._order.write(step, self._index)
        with self._compiling(self._train_batch):
            self._train_batch()
        self.lr_schedulers().step()  # pyright: ignore[reportOptionalMemberAccess,reportAttributeAccessIssue,reportCallIssue]

    def _train(self) -> None:
        """The device's part of a step: batch `_index` → gradients → weights; adds the cross entropy to `_loss`.

        In micro-batches the gradient is the same, but for attentions whose statistics are those of the call (LLN,
        AdaMRA) or move with it (Routing).
        """
        # Lightning's wrapper around the optimiser would count steps in Python, which a replay does not pass through.
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()  # pyright: ignore[reportAttributeAccessIssue]
        # What an attention does once would be compiled for one step, or break the graph of all that follow.
        compute = self._objective if all(m.ready for m in self.model.encoder.attentions()) else objective
        for index in self._part.chunk(self._accumulate):
            with self._autocast():
                losses, auxiliary, _ = compute(self.model, *self._splits["train"].gather(index))
            loss = losses.mean() / self._accumulate
            (loss + auxiliary / self._accumulate).backward()
            self._loss += loss.detach()
            self.model.release()
        average_gradients(self.model.parameters())
        if self.training_config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training_config.clip_norm)
        optimizer.step()  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]

    @contextmanager
    def _compiling(self, batch: Callable[[], None]) -> Iterator[None]:
        """Book what a call takes under compiling, as long as it is not a replay."""
        if self.first_step_at is not None and (not isinstance(batch, Captured) or batch.ready):
            yield
            return
        started = self._clock()
        yield
        ended = self._clock()
        self.first_step_at = self.first_step_at or ended
        if isinstance(batch, Captured):
            self.compile_seconds += ended - started

    def _close_interval(self) -> dict[str, float]:
        """The point of the learning curve that the interval's training gives, and its share of the speed."""
        first, started, compiled_before = self._interval_start
        seconds = self._clock() - started - (self.compile_seconds - compiled_before)
        self.train_seconds += seconds
        if self._warm:  # the first interval of a process still fills caches
            self.timed_steps += self.step - first
            self.timed_seconds += seconds
        self._warm = True
        losses = torch.stack([loss for _, _, loss in self._interval_losses])
        sums = self.trainer.strategy.reduce(losses, reduce_op="mean").tolist()
        for (step, count, _), loss in zip(self._interval_losses, sums, strict=True):
            if not math.isfinite(loss):
                raise LossNotFiniteError(f"the training loss became {loss} at or before step {step}")
            self._log({"train/loss": loss / count}, step)
        return {"step": self.step, "train_loss": sum(sums) / (self.step - first), "seconds": self.train_seconds}

    @property
    def steps_per_second(self) -> float | None:
        """Training steps a second, without validation; a process's first interval counts only if there is no other."""
        if self.timed_seconds:
            return self.timed_steps / self.timed_seconds
        steps, seconds = self.step - self.elsewhere[0], self.train_seconds - self.elsewhere[1]
        return steps / seconds if seconds else None

    def on_train_end(self) -> None:
        if self.bare_steps:
            self._time_bare_steps()
        self._note_memory()

    def _time_bare_steps(self) -> None:
        """Time the same steps without Lightning, or anything else, around them; the weights are put back."""
        trained = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        started = self._clock()
        for step in range(self.step, self.step + self.bare_steps):
            self._order.write(step, self._index)
            self._train_batch()
        self.bare_steps_per_second = self.bare_steps / (self._clock() - started)
        self.model.load_state_dict(trained)

    def _note_memory(self) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / MIB
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
        self.peak_mem_mib = max(self.peak_mem_mib, peak - self.data_mem_mib)

    # Evaluation

    def val_dataloader(self) -> list[int]:
        return [0]

    def validation_step(self, batch: int, batch_idx: int) -> None:
        point = self._close_interval()
        score = self.evaluate(self.validation_split)
        point |= {f"validation_{key}": getattr(score, key) for key in ("loss", "correct", "total")}
        self.curve.append(point)
        self._log({"validation/accuracy": score.accuracy, "validation/loss": score.loss}, self.step)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def test_dataloader(self) -> list[int]:
        return [0]

    def test_step(self, batch: int, batch_idx: int) -> None:
        self.test_score = self.evaluate("test")
        every = self.trainer.strategy.reduce(self._predicted[:-1].clone(), reduce_op="sum")
        self.test_predictions = every.cpu().numpy()  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def evaluate(self, split: str) -> Score:
        """Every item of a split, in batches of the protocol's size; Lightning has put the model into eval mode."""
        self._eval_loss.zero_()
        self._eval_correct.zero_()
        total, batch_size, ranks = len(self._splits[split]), len(self._index), self.trainer.world_size
        batch = torch.arange(batch_size, device=self.device)
        for first in range(self.global_rank * batch_size, total, ranks * batch_size):
            # The last batch is filled up with the first items, which do not count again.
            torch.remainder(batch + first, total, out=self._index)
            torch.less(batch + first, total, out=self._counts)
            with self._compiling(self._score_batch[split]):
                self._score_batch[split]()
        sums = torch.stack([self._eval_loss, self._eval_correct.double()])
        loss, correct = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        if not math.isfinite(loss):
            raise LossNotFiniteError(f"the {split} loss is {loss / total} at step {self.step}")
        return Score(step=self.step, correct=int(correct), total=total, loss=loss / total)

    def _score(self, split: str) -> None:
        """The device's part of evaluating a batch: adds up the items of `_index` that `_counts` names."""
        tokens, labels = self._splits[split].gather(self._index)
        with self._autocast():
            losses, _, predicted = self._objective(self.model, tokens, labels)
        self._eval_loss += (losses * self._counts).sum()
        self._eval_correct += ((predicted == labels) & self._counts).sum()
        if split == "test":
            self._predicted[self._index.masked_fill(~self._counts, len(self._predicted) - 1)] = predicted

    # Optimiser, precision, state

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config, cuda = self.training_config, self.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=torch.tensor(config.learning_rate, device=self.device) if cuda else config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=cuda,
            capturable=cuda,  # the rate and the counter of steps lie on the device, where a replay finds them
        )
        return {"optimizer": optimizer, "lr_scheduler": build_schedule(optimizer, config)}

    def _autocast(self) -> AbstractContextManager:
        # One context a step, not one a Lightning call: autocast keeps its bf16 copies of the weights until it exits.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._note_memory()
        state = {key: getattr(self, key) for key in STATE}
        checkpoint["cell"] = {"digest": self.digest, **asdict(self.origin), **state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["cell"]
        for key in STATE & saved.keys():
            setattr(self, key, saved[key])
        self.train_seconds_before = self.train_seconds
        self.processes = saved.get("processes", 1) + 1
        self.codes = [*dict.fromkeys([*saved.get("codes", ()), self.origin.code])]
        if saved.get("device", self.origin.device) != self.origin.device:  # its speed and memory are not of this one
            self.timed_steps, self.timed_seconds, self.peak_mem_mib = 0, 0.0, 0.0
            self.elsewhere = (self.step, self.train_seconds)


STATE = {
    *("step", "curve", "train_seconds", "timed_steps", "timed_seconds"),
    *("elsewhere", "peak_mem_mib", "processes", "codes"),  # not in checkpoints of earlier versions
}
"""What a checkpoint holds of a `CellModule` beside weights, optimiser and schedule."""


def objective(model: Classifier, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of each item (B,), the attention's own loss (), and the class that each is taken for (B,)."""
    logits = model(tokens).float()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return losses, model.auxiliary_loss(), logits.argmax(-1)


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
