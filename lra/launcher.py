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

from lra import cli, provenance
from lra import config as configuration
from lra.record import FILENAME, SCHEMA, Cell, Record, read_record, write_json

RUN = Path(__file__).parents[1] / "run.py"
RECORDS_ITSELF = (0, 1, 130)
"""Exit codes of `run.py` after which the cell has written its own record."""


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
            record = _run_job(job, slot)
        finally:
            free.put(slot)
        done += 1
        console.print(f"[{done}/{len(jobs)}] {job.cell.label}: {record['status']} {record['message']}".rstrip())
        return record

    console.print(f"{len(jobs)} cells, {len(slots)} at a time; logs beside each cell under {jobs[0].results_dir}/runs")
    with ThreadPoolExecutor(len(slots)) as pool:
        return list(pool.map(work, jobs))


def _run_job(job: Job, slot: str | None) -> Record:
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({} if slot is None else {"CUDA_VISIBLE_DEVICES": slot})
    with open(job.directory.with_name(f"{job.directory.name}.log"), "ab") as log:
        command = [sys.executable, str(RUN), *job.overrides]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    path = job.directory / FILENAME
    record = read_record(path)
    if code in RECORDS_ITSELF and record is not None:
        return record
    record = {
        "schema": SCHEMA,
        "kind": "cell",
        "status": "error",
        "message": f"the process ended with code {code}; see {log.name}",
        "cell": job.cell.to_dict(starred=job.starred),
        "config": job.resolved,
        "code": provenance.code_revision(),
        "versions": provenance.versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(path, record)
    return record


def _slots(per_gpu: int) -> list[str | None]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return [gpu for _ in range(per_gpu) for gpu in gpus] or [None]
