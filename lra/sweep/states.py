"""The state of every cell of a sweep, from its record, its pack's file and one question to the scheduler."""

import json
import os
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lra.overview import step_of
from lra.record import FILENAME, Record, is_held, read_record
from lra.sweep.manifest import Entry, Sweep

ALIVE = ("queued", "running", "unknown")
"""What may still change without anybody doing something; `lost` is a cell whose job ended without a record of it."""

QUESTION_SECONDS = 30


@dataclass
class State:
    """A cell of a sweep and how it stands: a status of its record, or one of `ALIVE`, or `lost`."""

    entry: Entry
    what: str
    detail: str = ""
    record: Record | None = None

    @property
    def alive(self) -> bool:
        return self.what in ALIVE


def of(sweep: Sweep) -> list[State]:
    """The state of each cell that counts."""
    alive = _alive_jobs(sweep)
    packs = [_pack_file(sweep, k) for k in range(len(sweep.jobs))]
    seen: Counter[int] = Counter()
    found = []
    for entry in sweep.entries:
        index = -1
        if entry.pack is not None:
            index = seen[entry.pack]  # cells of a pack stand in its order
            seen[entry.pack] += 1
        if not entry.replaced:
            found.append(_state(sweep, entry, index, packs, alive))
    return found


def counts(states: Sequence[State]) -> str:
    """`3 ok, 1 nan, 2 running` in a fixed order."""
    number = Counter(state.what for state in states)
    first = [name for name in ("ok", *ALIVE) if number[name]]
    return ", ".join(f"{number[name]} {name}" for name in [*first, *sorted(set(number) - set(first))]) or "no cells"


def show(sweep: Sweep, states: Sequence[State], console: Console) -> None:
    """One line a cell, then the counts, and what is odd about the code."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("cell", "state", "job", ""):
        table.add_column(column, overflow="fold")
    for state in states:
        style = "green" if state.what == "ok" else "" if state.alive else "bold red"
        job = "" if state.entry.pack is None else sweep.jobs[state.entry.pack]
        table.add_row(Text(state.entry.cell.label), Text(state.what, style=style), Text(job), Text(state.detail))
    console.print(table)
    console.print(f"sweep {sweep.name}: {counts(states)}")
    for line in remarks(sweep, states):
        console.print(Text(line, style="yellow"), soft_wrap=True)


def remarks(sweep: Sweep, states: Sequence[State]) -> list[str]:
    """What a reader must know about the checkout: uncommitted at submission, or another one when a cell started."""
    lines = []
    if sweep.code.get("dirty"):
        lines.append(f"submitted from a checkout with uncommitted changes on {sweep.code['revision'][:12]}")
    for state in states:
        code = (state.record or {}).get("code") or {}
        then = code.get("digest_at_submission")
        if then is not None and then != code.get("digest"):
            lines.append(f"{state.entry.cell.label}: the code changed between submission and start")
    return lines


def collect(sweep: Sweep, console: Console) -> bool:
    """Rebuild the tables from what is there and show the cells; whether all of them are ok."""
    from lra import report  # imports pandas

    tables = report.refresh(sweep.results_dir)
    states = of(sweep)
    show(sweep, states, console)
    for path in [*tables.paths, *report.to_documents(tables, sweep.results_dir)]:
        console.print(str(path), soft_wrap=True)
    return all(state.what == "ok" for state in states)


def _state(sweep: Sweep, entry: Entry, index: int, packs: list[dict[str, Any]], alive: dict[str, str] | None) -> State:
    directory = entry.cell.directory(sweep.results_dir)
    record = read_record(directory / FILENAME)
    status = "lost" if record is None else record["status"]
    message = "" if record is None else str(record.get("message") or "").partition("\n")[0]
    if entry.pack is None:
        return State(entry, status, message, record)
    file, job = packs[entry.pack], sweep.jobs[entry.pack]
    if status != "ok" and (alive is None or job not in alive) and is_held(directory):
        return State(entry, "running", "by another sweep or shell", record)
    if str(index) in file.get("ended", {}):
        return State(entry, status, message, record)
    if alive is None and status != "ok" and not file.get("over"):
        return State(entry, "unknown", "the scheduler does not answer", record)
    if alive is None or job not in alive:
        if status == "lost":
            how = "was stopped before this cell began" if file.get("stopped") else "ended without a record"
            message = f"its job {how}; see {sweep.folder / 'jobs'}"
        return State(entry, status, message, record)
    if alive[job] == "running" and file.get("now") == index:
        step, steps = step_of(directory.with_name(f"{directory.name}.log"))
        return State(entry, "running", f"step {step} of {steps}" if steps else "starting", record)
    return State(entry, "queued", "behind others of its job" if alive[job] == "running" else "", record)


def _pack_file(sweep: Sweep, k: int) -> dict[str, Any]:
    try:
        return json.loads((sweep.folder / f"pack{k}.json").read_text())
    except (OSError, ValueError):
        return {}


def _alive_jobs(sweep: Sweep) -> dict[str, str] | None:
    """Job id to `running` or `queued`, of the jobs that have not ended; None where the scheduler does not answer."""
    if not any(sweep.jobs):
        return {}
    return _local_jobs(sweep) if sweep.settings.get("cluster") == "local" else _slurm_jobs(sweep)


def _slurm_jobs(sweep: Sweep) -> dict[str, str] | None:
    """Asks `squeue`, which every cluster has; `sacct` fails where there is no accounting database."""
    arrays = sorted({job.partition("_")[0] for job in sweep.jobs if job})
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(arrays)}", "--format=%i %T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=QUESTION_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:  # SLURM forgets jobs some minutes after their end
        return None
    jobs = {}
    for line in answer.stdout.splitlines():
        job, _, state = line.strip().partition(" ")
        if state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"):
            jobs[job] = "running"
        elif state.startswith(("PENDING", "CONFIGURING", "REQUEUE", "RESIZING", "SPECIAL_EXIT")):
            jobs[job] = "queued"
    return jobs


def _local_jobs(sweep: Sweep) -> dict[str, str]:
    """Jobs of submitit's local executor: their id is that of a process, on this machine or not."""
    jobs = {}
    for k, job in enumerate(sweep.jobs):
        file = _pack_file(sweep, k)
        elsewhere = file.get("host") not in (None, socket.gethostname())
        if not file.get("over") and (elsewhere or _is_process(job)):
            jobs[job] = "running" if file else "queued"
    return jobs


def _is_process(job: str) -> bool:
    """Whether a process of that id runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(int(job), 0)
        status = Path(f"/proc/{job}/stat").read_text().rpartition(")")[2].split()
    except (ProcessLookupError, ValueError):
        return False
    except (OSError, IndexError):  # someone else's, or no /proc here
        return True
    return status[0] != "Z"
