"""A multirun on this machine: every cell is a process of its own, one or more on each GPU."""

import contextlib
import datetime
import math
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from hydra.core.utils import filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict
from rich.console import Console

from lra import cli, provenance
from lra import config as configuration
from lra.config import Config
from lra.errors import UserError
from lra.overview import Overview
from lra.record import FILENAME, SCHEMA, Cell, Record, is_held, lock_of, read_record, write_json
from lra.staleness import stale

RUN = Path(__file__).parents[1] / "run.py"
MISTAKE = 2
"""Exit code of `run.py` for a command that it refused in one line."""


CONTINUES = ("interrupted", "preempted", "timeout")
"""Outcomes from which a cell goes on without being asked; `oom`, `nan` and `error` repeat only by `rerun=failed`."""

STOPPED = tuple(-number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
"""Exit codes of a process that a scheduler, or its user, wanted to end."""

KILL_AFTER_SECONDS = 30.0
"""Between asking a cell that is over its limit to end, and ending it."""


@dataclass
class Job:
    """One cell of a multirun and how it is started."""

    cell: Cell
    starred: bool
    overrides: list[str]
    config: Config

    @property
    def results_dir(self) -> Path:
        return Path(self.config.results_dir)

    @property
    def directory(self) -> Path:
        return self.cell.directory(self.results_dir)

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")

    @property
    def stored(self) -> Record | None:
        return read_record(self.directory / FILENAME)


def check_jobs(context: HydraContext, base: DictConfig, grid: Sequence[Sequence[str]]) -> list[Job]:
    """Compose and check the cells of a sweep; raises what a mistake in one raises, UserError for one named twice."""
    jobs = [_check_job(context, base, overrides) for overrides in grid]
    first: dict[Path, Job] = {}
    for job in jobs:
        if (other := first.setdefault(job.directory, job)) is not job:
            named = (" ".join(each.overrides) for each in (other, job))
            raise UserError(f"{job.cell.label} is twice in this grid: {' and '.join(named)}; name every cell once")
    return jobs


def _check_job(context: HydraContext, base: DictConfig, overrides: Sequence[str]) -> Job:
    composed = context.config_loader.load_sweep_config(base, list(overrides))
    choices = composed.hydra.runtime.choices
    with open_dict(composed):
        del composed["hydra"]
    config = configuration.load(composed)
    cell, starred = cli.identify(composed, choices)
    return Job(cell, starred, list(filter_overrides(overrides)), config)


def launch(jobs: list[Job], per_gpu: int, limit_minutes: float | None = None) -> None:
    """Run the cells, refresh the tables, show what came out; CellFailedError if a cell did not finish."""
    from lra import report  # imports pandas, which a single cell's start need not wait for

    if limit_minutes is not None and not 0 < limit_minutes < math.inf:
        allowed = "it must be a positive number of minutes, or null"
        raise UserError(f"hydra.launcher.limit_minutes={limit_minutes} is not possible; {allowed}")
    console = Console()
    devices = max(job.config.trainer.devices for job in jobs)
    records = run_jobs(jobs, _slots(per_gpu, devices), console, limit_minutes)
    for results_dir in {job.results_dir for job in jobs}:
        report.refresh(results_dir)
    marks = [stale(record, job.config) for job, record in zip(jobs, records, strict=True)]
    report.print_multirun(records, console, marks)
    if any(record["status"] != "ok" for record in records):
        raise cli.CellFailedError


def kept(job: Job) -> tuple[Record, str] | None:
    """The record of a cell that is not run again, and why it is not; None for a cell that is."""
    record, rerun = job.stored, job.config.rerun
    if record is None or job.config.afresh:
        return None
    if record["status"] == "ok":
        reason = stale(record, job.config)
        return record, f"finished before, stale ({reason}); rerun=true repeats it" if reason else "finished before"
    if record["status"] in CONTINUES or rerun == "failed":
        return None
    return record, "failed before; rerun=failed repeats it"


def run_jobs(
    jobs: list[Job], slots: list[str | None], console: Console, limit_minutes: float | None = None
) -> list[Record]:
    """Run all jobs that are not `kept`, as many at a time as there are slots; all records, in the order of the jobs."""
    free: queue.Queue[str | None] = queue.Queue()
    for slot in slots:
        free.put(slot)
    for job in jobs:
        _make_folder(job.directory.parent)
    logs = f"logs beside each cell under {jobs[0].results_dir}/runs"
    console.print(f"{len(jobs)} cells, {len(slots)} at a time; {logs}", soft_wrap=True)

    with Overview(console, len(jobs), len(slots)) as overview, ThreadPoolExecutor(len(slots)) as pool:

        def work(job: Job) -> Record:
            slot = free.get()
            try:
                overview.start(job.cell, job.log)
                record = run_job(job, slot, sharing=slots.count(slot), limit_minutes=limit_minutes)
            finally:
                free.put(slot)
            overview.finish(job.cell, record)
            return record

        records: list[Record | Future[Record]] = []
        for job in jobs:
            if found := kept(job):
                overview.skip(job.cell, found[0]["status"], found[1])
            records.append(found[0] if found else pool.submit(work, job))
        try:
            return [record.result() if isinstance(record, Future) else record for record in records]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # those that run have heard Ctrl-C too
            raise


def run_job(
    job: Job,
    slot: str | None = None,
    sharing: int = 1,
    limit_minutes: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Record:
    """Run one cell as a process of its own; its record, one made here where the process left none.

    What the process says goes to `seed<k>.log` beside the cell. Past its limit it is ended: status `timeout`. A cell
    that another process trains is left to it, with its log and the record that it will write.
    """
    if is_held(job.directory):
        return _ended(job, "error", f"{job.cell.label} is being trained by another process")
    before = job.stored
    settings = {**os.environ, **(environment or {}), provenance.SHARING: str(sharing)}
    settings |= {} if slot is None else {"CUDA_VISIBLE_DEVICES": slot}
    command = [sys.executable, str(RUN), *job.overrides]
    with open(job.log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=settings)
        code = _wait(process, limit_minutes)
    after = job.stored
    if after is not None and code is not None and (code == 0 or after != before):
        return after
    status, message = "error", f"the process ended with code {code}; see {job.log}"
    if code is None:
        status, message = "timeout", f"ended at its limit of {limit_minutes:g} minutes; the command continues it"
    elif code in STOPPED:
        status, message = "preempted", f"stopped by {signal.Signals(-code).name}; the command continues it"
    elif code == MISTAKE:
        message = _last_words(job.log)
    return keep(job, status, message)


def _wait(process: subprocess.Popen, limit_minutes: float | None) -> int | None:
    """The exit code of a cell's process; None where it was ended at its limit."""
    try:
        return process.wait(None if limit_minutes is None else 60 * limit_minutes)
    except subprocess.TimeoutExpired:
        _end(process)
        return None
    except BaseException:  # submitit requeues the job, or gives it up: a cell must not outlive it
        _end(process)
        raise


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(KILL_AFTER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def keep(job: Job, status: str, message: str) -> Record:
    """Write the record of a process that left none, unless the cell has finished, or another process holds it."""
    record = _ended(job, status, message)
    with contextlib.suppress(Timeout, OSError), FileLock(lock_of(job.directory), timeout=0):
        stored = job.stored
        if stored is None or stored["status"] != "ok":
            write_json(job.directory / FILENAME, record)
    return record


def _ended(job: Job, status: str, message: str) -> Record:
    return {
        "schema": SCHEMA,
        "kind": "cell",
        "status": status,
        "message": message,
        "cell": job.cell.to_dict(starred=job.starred),
        "config": job.config.resolved,
        "code": provenance.code_revision(),
        "versions": provenance.versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _last_words(log: Path) -> str:
    """The one line with which `run.py` refused a command."""
    said = log.read_text(errors="replace").rstrip().rpartition("\n")[2]
    return said or f"the process ended with code {MISTAKE} and could not say why"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"results_dir: cannot write to {folder} ({error.strerror}); choose another results_dir"
        ) from error


def _slots(per_gpu: int, devices: int = 1) -> list[str | None]:
    """What a cell sees of the GPUs: `devices` of them each; as often as cells share them."""
    if not isinstance(per_gpu, int) or per_gpu < 1:
        raise UserError(f"hydra.launcher.per_gpu={per_gpu} is not possible; it must be a positive integer")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    groups = [",".join(gpus[i : i + devices]) for i in range(0, len(gpus) - devices + 1, devices)]
    return [*groups * per_gpu] or [None]
