"""One cell: prepare, fit, test, measure, record. Whatever happens to it ends in its record."""

import datetime
import os
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from rich.console import Console
from torch._dynamo.utils import counters

from lra import predictions, provenance, tasks
from lra.checkpoints import BEST, LAST, Checkpoints, best_point
from lra.config import Config
from lra.errors import UserError
from lra.loggers import build_logger
from lra.model import build_classifier
from lra.module import MIB, CellModule, LossNotFiniteError, Origin, Score
from lra.predictions import Predictions
from lra.progress import TrainingProgress, quieten_lightning
from lra.ranks import OneAllReduce, end_helpers, end_with_parent, rank_of_process
from lra.record import FILENAME, SCHEMA, Cell, Record, lock_of, read_record, write_json
from lra.seeding import seed_all
from lra.tasks import TaskData

STEPS_PER_CALL = {"cpu": 1, "cuda": 50}
SECONDS_TO_RECORD = 30.0


def run_cell(config: Config, cell: Cell, *, starred: bool, console: Console) -> Record:
    """Train, test and record one cell; returns its record, the stored one if the cell has finished before.

    A cell that was killed continues from its last checkpoint. A failure is recorded (`status`, `message`) and
    returned, never raised; only a UserError, a mistake found before training, is.
    """
    directory = cell.directory(config.results_dir)
    if (stored := _finished(config, directory)) is not None:
        return stored
    run = _Run(config, directory)
    _make_writable(directory)
    with _held(directory, cell.label):  # another process may have finished it while this one waited
        return _finished(config, directory) or _run_and_record(run, cell, starred, console)


def _finished(config: Config, directory: Path) -> Record | None:
    """The record of a cell that is not to be trained again."""
    stored = read_record(directory / FILENAME)
    return stored if stored is not None and stored["status"] == "ok" and not config.afresh else None


def help_cell(config: Config, cell: Cell) -> None:
    """In a process that the Trainer of a cell on several devices has started: take part, and leave the record to it."""
    quieten_lightning()
    end_with_parent()
    run = _Run(config, cell.directory(config.results_dir))
    try:
        run.execute(cell.label, Console(quiet=True))
    except Exception:
        time.sleep(SECONDS_TO_RECORD)  # for when it has failed in the same way: our end is its end
        raise


def helps(config: Config) -> bool:
    """Whether this process is such a one."""
    return rank_of_process(config.trainer.devices) > 0


def _run_and_record(run: "_Run", cell: Cell, starred: bool, console: Console) -> Record:
    quieten_lightning()
    config, directory = run.config, run.directory
    record: Record = {
        "schema": SCHEMA,
        "kind": "cell",
        "status": "error",
        "message": "",
        "cell": cell.to_dict(starred=starred),
        "config": config.resolved,
        "code": provenance.code_revision(),
        "versions": provenance.versions(),
        "selection": config.protocol.selection,
    }
    try:
        record |= run.execute(cell.label, console)
        record["status"] = "ok"
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        record |= {"status": "oom", "message": _first_line(error)}
    except LossNotFiniteError as error:
        record |= {"status": "nan", "message": str(error)}
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into SystemExit
        saved = run.checkpoints.saved_step
        kept = f"step {saved}, its last checkpoint" if saved else "the start, before a checkpoint"
        message = f"stopped at step {run.step}; without rerun=true the command continues from {kept}"
        record |= {"status": "interrupted", "message": message}
    except Exception as error:
        traceback.print_exc()
        record |= {"status": "error", "message": f"{type(error).__name__}: {_first_line(error)}"}
    record |= run.measurements()
    if run.module is not None:
        record["code"] |= {"trained_by": run.module.codes}
    try:
        write_json(directory / FILENAME, record)
    except OSError as error:
        reason = f"cannot write the record to {directory} ({error.strerror})"
        raise UserError(f"results_dir: {reason}; the command continues the cell from its last checkpoint") from error
    return record


class _Run:
    """The phases of a cell, with their wall time; keeps what is known when a phase fails."""

    def __init__(self, config: Config, directory: Path):
        self.config, self.directory = config, directory
        self.rank = rank_of_process(config.trainer.devices)
        self.device = _device(config.trainer.accelerator, config.trainer.devices, self.rank)
        self.precision = _precision(config.trainer.precision, self.device)
        _check_kernels(config.attention_options.get("impl"), self.device)
        self.module: CellModule | None = None
        self.checkpoints = Checkpoints(directory)
        self.known: dict[str, Any] = {}
        self.wall: dict[str, float] = {}
        self.started = time.perf_counter()
        self.fit_started = 0.0

    @property
    def step(self) -> int:
        return self.module.step if self.module else 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - started

    def execute(self, label: str, console: Console) -> dict[str, Any]:
        config = self.config
        task = tasks.build(config.task["name"], **config.task_options)
        with self.phase("data"):
            data = task.prepare(Path(config.data.root), progress=console.is_terminal)
            self.known["data"] = {"digest": data.digest, "source": data.source, "counts": data.counts}
        with self.phase("setup"):
            if config.afresh and self.rank == 0:
                _empty(self.directory)
            self.module = module = self._build_module(task, data)
            shown = [TrainingProgress(label, console)] if self.rank == 0 else []
            trainer = self._build_trainer([self.checkpoints, *shown])
            resume = self._resume(module)
        try:
            if module.step < config.training.steps:
                with self.phase("fit"):
                    self.fit_started = time.perf_counter()
                    trainer.fit(module, ckpt_path=resume)
                self.wall["compile"] = module.compile_seconds
            with self.phase("test"):
                scores, predicted = self._test(trainer, module)
                if self.rank == 0:
                    predictions.write(self.directory, Predictions(data.splits["test"].labels, **predicted))
        except BaseException:
            end_helpers(trainer)
            raise
        return {"test": {name: _integers(score) for name, score in scores.items()}, "validation": _validation(module)}

    def _resume(self, module: CellModule) -> Path | None:
        """The checkpoint to continue from, its weights and state loaded into the module; None for a fresh start."""
        path = self.directory / LAST
        if not path.exists():
            return None
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            message = f"{path} is damaged ({_first_line(error)}); rerun=true starts the cell again"
            raise UserError(message) from error
        saved, here = checkpoint["cell"], module.origin.computed_by
        if saved["digest"] != module.digest:
            raise UserError(
                f"{path} was trained on data {saved['digest'][:12]}, task={self.config.task['name']} "
                f"now has {module.digest[:12]}; rerun=true starts the cell again"
            )
        if saved.get("computed_by", here) != here:
            raise UserError(
                f"{path} was computed by {saved['computed_by']}, here it would be by {here}; continue it on "
                f"{saved['device']['name']}, or rerun=true starts the cell again"
            )
        module.load_state_dict(checkpoint["state_dict"])
        module.on_load_checkpoint(checkpoint)
        self.checkpoints.saved_step = module.step
        return path

    def _build_module(self, task: tasks.Task, data: TaskData) -> CellModule:
        config = self.config
        seed_all(config.seed, "init")
        model = build_classifier(
            asdict(config.model),
            config.attention["name"],
            config.attention_options,
            num_classes=task.num_classes,
            two_towers=task.two_towers,
        )
        labels = np.bincount(data.splits["test"].labels)
        compiled, calls = config.trainer.compile, config.trainer.steps_per_call
        compiled = self.device.type == "cuda" if compiled == "auto" else compiled
        impl = model.to(self.device).attention_impl(compiled)
        device = provenance.device_description(self.device, config.trainer.devices)
        self.known |= {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "impl": impl,
            "precision": self.precision,
            "device": device,
            "class_prior": float(labels.max() / labels.sum()),
        }
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return CellModule(
            model,
            data,
            config.training,
            seed=config.seed,
            precision=self.precision,
            compiled=compiled,
            steps_per_call=STEPS_PER_CALL[self.device.type] if calls == "auto" else calls,
            accumulate=config.trainer.accumulate,
            selection=config.protocol.selection,
            origin=Origin(provenance.code_digest(), f"{impl} in {self.precision}", device),
            bare_steps=config.trainer.bare_steps,
        )

    def _build_trainer(self, callbacks: list) -> Trainer:
        training, devices = self.config.training, self.config.trainer.devices
        logger = build_logger(self.config.logger, self.directory, self.config.resolved) if self.rank == 0 else False
        return Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=devices,
            deterministic=self.config.trainer.deterministic,
            strategy="auto" if devices == 1 else OneAllReduce(),
            max_epochs=-(-training.steps // training.validate_every),
            reload_dataloaders_every_n_epochs=1,  # the last interval may be shorter, and is validated too
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            callbacks=callbacks,
            plugins=[LightningEnvironment()],  # also in a SLURM job, whose signals and requeue are submitit's
            logger=logger,
            enable_checkpointing=False,  # `Checkpoints` does it
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.directory,
        )

    def _test(self, trainer: Trainer, module: CellModule) -> tuple[dict[str, Score], dict[str, np.ndarray]]:
        """Scores and predictions of the last step and of the best validation, on the whole test set."""
        trainer.test(module, verbose=False)
        last = best = module.test_score
        predicted: dict[str, np.ndarray] = {name: module.test_predictions for name in ("best", "last")}
        best_step = int(best_point(module.curve, module.selection)["step"])
        if best_step != last.step:
            checkpoint = torch.load(self.directory / BEST, map_location=self.device, weights_only=True)
            if checkpoint["cell"]["step"] != best_step:
                held = checkpoint["cell"]["step"]
                raise RuntimeError(f"{self.directory / BEST} holds step {held}, the best validation was at {best_step}")
            module.load_state_dict(checkpoint["state_dict"])
            trainer.test(module, verbose=False)
            best = replace(module.test_score, step=best_step)
            predicted["best"] = module.test_predictions
        return {"best": best, "last": last}, predicted

    def _warming_up(self, module: CellModule) -> dict[str, Any]:
        """Seconds to the end of the first step, data not counted; and whether all of its code was compiled before."""
        if module.first_step_at is None or "fit" not in self.wall:
            return {}
        seconds = module.first_step_at - self.started - self.wall.get("data", 0.0)
        compiled = counters["inductor"]
        new, old = (compiled[f"fxgraph_cache_{kind}"] for kind in ("miss", "hit"))
        return {"first_step_s": seconds, "compile_cache": "cold" if new else "warm" if old else "none"}

    def measurements(self) -> dict[str, Any]:
        """What is known now: of a finished run everything, of a failed one as far as it came."""
        wall = dict(self.wall)
        known = dict(self.known)
        if self.module is not None:
            train, compiling = self.module.train_seconds, wall.setdefault("compile", self.module.compile_seconds)
            joining = (self.module.set_up_at or self.fit_started) - self.fit_started if "fit" in wall else 0.0
            validate = wall.pop("fit", 0.0) - joining - (train - self.module.train_seconds_before) - compiling
            wall["setup"] = wall.get("setup", 0.0) + joining  # where Lightning waits for the other ranks
            wall |= {"train": train, "validate": max(0.0, validate)}  # training counts over all processes of the cell
            known |= {"steps": self.step, "steps_per_s": self.module.steps_per_second, "curve": self.module.curve}
            known |= {"peak_mem_mib": self.module.peak_mem_mib or None, "data_mem_mib": self.module.data_mem_mib}
            known |= {"processes": self.module.processes}
            known |= {"bare_steps_per_s": self.module.bare_steps_per_second, **self._warming_up(self.module)}
        wall["total"] = time.perf_counter() - self.started
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {**known, "wall_s": wall, "finished": finished}


def _integers(score: Score) -> dict[str, int]:
    return {"step": score.step, "correct": score.correct, "total": score.total}


def _validation(module: CellModule) -> dict[str, dict[str, int]]:
    points = {"best": best_point(module.curve, module.selection), "last": module.curve[-1]}
    keys = {"step": "step", "correct": "validation_correct", "total": "validation_total"}
    return {name: {key: int(point[at]) for key, at in keys.items()} for name, point in points.items()}


def _device(accelerator: str, devices: int, rank: int) -> torch.device:
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=cuda is not possible; this machine shows no CUDA device, use cpu or auto")
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if (shown := torch.cuda.device_count()) < devices:
        raise UserError(f"trainer.devices={devices} is not possible; this machine shows {shown} CUDA devices")
    return torch.device("cuda", rank)


def _check_kernels(impl: str | None, device: torch.device) -> None:
    if impl != "triton" or device.type == "cuda":
        return
    from kernels.common.launch import INTERPRETED  # Triton is needed only here

    if not INTERPRETED:
        raise UserError(
            "attention.impl=triton is not possible; this cell runs on the CPU, use auto or reference "
            "(TRITON_INTERPRET=1 runs the kernels there, slowly)"
        )


def _precision(precision: str, device: torch.device) -> str:
    return precision if precision != "auto" else {"cpu": "32", "cuda": "bf16"}[device.type]


def _make_writable(directory: Path) -> None:
    """Create the cell's folder; UserError where nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.write_bytes(b"\0" * MIB)
        probe.unlink()
    except OSError as error:
        reason = f"cannot write to {directory} ({error.strerror})"
        raise UserError(f"results_dir: {reason}; choose another results_dir") from error


def _empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


@contextmanager
def _held(directory: Path, label: str) -> Iterator[None]:
    """Hold the cell: two processes never train it at once. The lock dies with its process."""
    lock = FileLock(lock_of(directory), timeout=1)  # who looks whether it is held, holds it for a moment
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{label} is being trained by another process; wait for it, or choose another seed") from error
    with lock:
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
