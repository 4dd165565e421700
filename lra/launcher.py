"""A multirun on this machine: every cell is a process of its own, one or more on each GPU."""

import datetime
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.utils import filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.text import Text

from lra import cli, provenance
from lra import config as configuration
from lra.errors import UserError
from lra.record import FILENAME, SCHEMA, Cell, Record, read_record, write_json

RUN = Path(__file__).parents[1] / "run.py"
MISTAKE = 2
"""Exit code of `run.py` for a command that it refused in one line."""


@dataclass
class Job:
    """One cell of a multirun and how it is started."""

    cell: Cell
    starred: bool
    overrides: list[str]
    results_dir: Path
    resolved: dict[str, Any]

    @property
    def directory(self) -> Path:
        return self.cell.directory(self.results_dir)


def check_job(context: HydraContext, base: DictConfig, overrides: Sequence[str]) -> Job:
    """Compose and check one cell of a sweep; raises what a mistake in it raises."""
    composed = context.config_loader.load_sweep_config(base, list(overrides))
    choices = composed.hydra.runtime.choices
    with open_dict(composed):
        del composed["hydra"]
    config = configuration.load(composed)
    cell, starred = cli.identify(composed, choices)
    return Job(cell, starred, list(filter_overrides(overrides)), Path(config.results_dir), config.resolved)


def launch(jobs: list[Job], per_gpu: int) -> None:
    """Run the cells, refresh the tables, show what came out; CellFailedError if a cell did not finish."""
    from lra import report  # imports pandas, which a single cell's start need not wait for

    console = Console()
    records = run_jobs(jobs, _slots(per_gpu), console)
    for results_dir in {job.results_dir for job in jobs}:
        report.refresh(results_dir)
    report.print_multirun(records, console)
    if any(record["status"] != "ok" for record in records):
        raise cli.CellFailedError


def run_jobs(jobs: list[Job], slots: list[str | None], console: Console) -> list[Record]:
    """Run all jobs, as many at a time as there are slots; their records, in the order of the jobs."""
    free: queue.Queue[str | None] = queue.Queue()
    for slot in slots:
        free.put(slot)
    done = 0

    def work(job: Job) -> Record:
        nonlocal done
        slot = free.get()
        try:
            record = _run_job(job, slot, sharing=slots.count(slot))
        finally:
            free.put(slot)
        done += 1
        line = f"[{done}/{len(jobs)}] {job.cell.label}: {record['status']} {record.get('message') or ''}"
        console.print(Text(line.rstrip()), soft_wrap=True)
        return record

    for job in jobs:
        _make_folder(job.directory.parent)
    console.print(f"{len(jobs)} cells, {len(slots)} at a time; logs beside each cell under {jobs[0].results_dir}/runs")
    with ThreadPoolExecutor(len(slots)) as pool:
        return list(pool.map(work, jobs))


def _run_job(job: Job, slot: str | None, sharing: int) -> Record:
    path = job.directory / FILENAME
    before = read_record(path)
    environment = os.environ | {provenance.SHARING: str(sharing)}
    environment |= {} if slot is None else {"CUDA_VISIBLE_DEVICES": slot}
    command = [sys.executable, str(RUN), *job.overrides]
    log = job.directory.with_name(f"{job.directory.name}.log")
    with open(log, "wb") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    after = read_record(path)
    if after is not None and (code == 0 or after != before):
        return after
    record = {
        "schema": SCHEMA,
        "kind": "cell",
        "status": "error",
        "message": _last_words(log) if code == MISTAKE else f"the process ended with code {code}; see {log}",
        "cell": job.cell.to_dict(starred=job.starred),
        "config": job.resolved,
        "code": provenance.code_revision(),
        "versions": provenance.versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if before is None:  # what an earlier run of the cell found out stays
        write_json(path, record)
    return record


def _last_words(log: Path) -> str:
    """The one line with which `run.py` refused a command."""
    return log.read_text(errors="replace").rstrip().rpartition("\n")[2]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"results_dir: cannot write to {folder} ({error.strerror}); choose another results_dir"
        ) from error


def _slots(per_gpu: int) -> list[str | None]:
    if not isinstance(per_gpu, int) or per_gpu < 1:
        raise UserError(f"hydra.launcher.per_gpu={per_gpu} is not possible; it must be a positive integer")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return [gpu for _ in range(per_gpu) for gpu in gpus] or [None]
