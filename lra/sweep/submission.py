"""From checked cells to jobs: prepare the data, pack the cells, estimate, submit, and wait if asked."""

import datetime
import re
import shlex
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import submitit
from rich.console import Console

from lra import cli, provenance, tasks
from lra.errors import UserError
from lra.launcher import Job, kept
from lra.overview import duration
from lra.record import Cell, Record, canonical_json, read_records
from lra.sweep import states
from lra.sweep.manifest import Entry, Sweep
from lra.sweep.settings import Settings
from lra.sweep.worker import Pack

SHAPES = ("task", "attention", "model", "protocol", "trainer", "data")
"""Sections in which cells of a pack agree, beside their batch: what they compile serves each of them."""

SECONDS_BETWEEN_LOOKS = 5.0


def launch(jobs: list[Job], settings: Settings) -> None:
    """Submit the cells that are not done, or only show the plan; with `wait` stay until the last job has ended."""
    console = Console()
    if len({job.results_dir for job in jobs}) > 1:
        raise UserError("results_dir has several values; a sweep has one folder")
    found = [kept(job) for job in jobs]
    waiting = [job for job, record in zip(jobs, found, strict=True) if record is None]
    for job, record in zip(jobs, found, strict=True):
        if record is not None:
            console.print(f"{job.cell.label}: {record[0]['status']}, {record[1]}", soft_wrap=True)
    sweep = _new(jobs[0].results_dir, settings)
    packs = pack(waiting, settings.cells_per_job)
    if settings.plan:
        _plan(sweep, settings, packs, console)
        return
    _check_cluster(settings)
    _claim(sweep)
    sweep.entries = [Entry.of(job, None) for job, record in zip(jobs, found, strict=True) if record is not None]
    submit(sweep, packs, settings, console)
    if settings.wait:
        wait(sweep, console)


def pack(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Jobs of equal shape together, at most `size`, in the order given."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        shape = [job.config.resolved.get(section) for section in SHAPES]
        groups.setdefault(canonical_json([shape, job.config.training.batch_size]), []).append(job)
    return [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]


def submit(sweep: Sweep, packs: list[list[Job]], settings: Settings, console: Console) -> None:
    """Prepare the data here, where there is a network, and submit a job a pack, written down before and after."""
    if not packs:
        sweep.write()
        console.print("nothing to submit: every cell is done")
        return
    _prepare([job for jobs in packs for job in jobs], console)
    first = len(sweep.jobs)
    work = []
    for k, jobs in enumerate(packs, start=first):
        for job in jobs:
            _name_group(job, sweep.name)
        sweep.entries += [Entry.of(job, k) for job in jobs]
        state = sweep.folder.resolve() / f"pack{k}.json"
        work.append(Pack(jobs, state, Path.cwd(), provenance.code_digest()))
    sweep.jobs += [""] * len(work)
    sweep.write()
    for at in range(0, len(work), settings.max_jobs):
        part = work[at : at + settings.max_jobs]
        try:
            submitted = _executor(sweep, settings).map_array(_run, part)
        except Exception as error:  # submitit passes on whatever sbatch says
            reason = " ".join(str(error).split())
            raise UserError(f"the cluster refused the jobs: {reason}") from error
        sweep.jobs[first + at : first + at + len(part)] = [job.job_id for job in submitted]
        sweep.write()
    ids = sorted({job.partition("_")[0] for job in sweep.jobs[first:]})
    cells = sum(map(len, packs))
    console.print(f"sweep {sweep.name}: {cells} cells in {len(packs)} jobs, {settings.cluster} {', '.join(ids)}")
    console.print(f"python scripts/sweep.py status {sweep.name} --results-dir {sweep.results_dir}", soft_wrap=True)


def wait(sweep: Sweep, console: Console) -> None:
    """A line whenever the counts change, until no job is left; then tables and outcome as after a local multirun."""
    shown = ""
    try:
        while True:
            seen = states.of(sweep)
            if (counts := states.counts(seen)) != shown:
                console.print(counts)
                shown = counts
            if not any(state.alive for state in seen):
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        console.print(f"the jobs go on; python scripts/sweep.py status {sweep.name}", soft_wrap=True)
        raise
    if not states.collect(sweep, console):
        raise cli.CellFailedError


def _run(work: Pack) -> list[str]:
    """What a job of the array does; a function, so that submitit's array has one, and the packs are its arguments."""
    return work()


def _new(results_dir: Path, settings: Settings) -> Sweep:
    now = datetime.datetime.now(datetime.UTC)
    name = settings.name or now.strftime("%Y%m%d-%H%M%S")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        allowed = "it must be letters, digits and _ . -"
        raise UserError(f"hydra.launcher.name={name} is not possible; {allowed}")
    return Sweep(name, results_dir, now.isoformat(), provenance.code_revision(), asdict(settings))


def _claim(sweep: Sweep) -> None:
    try:
        sweep.folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"hydra.launcher.name={sweep.name} is taken: {sweep.folder} exists; use another") from None
    except OSError as error:
        reason = f"cannot write to {sweep.folder} ({error.strerror})"
        raise UserError(f"results_dir: {reason}; choose another results_dir") from error


def _check_cluster(settings: Settings) -> None:
    missing = [program for program in ("sbatch", "srun", "squeue") if shutil.which(program) is None]
    if settings.cluster == "slurm" and missing:
        found = f"this machine has no {missing[0]}"
        raise UserError(f"hydra/launcher=slurm is not possible; {found}; submit where SLURM is, or use plan=true")


def _executor(sweep: Sweep, settings: Settings) -> submitit.Executor:
    folder = sweep.folder.resolve() / "jobs"
    root = str(provenance.REPOSITORY)
    if settings.cluster == "slurm":
        executor: submitit.Executor = submitit.SlurmExecutor(folder, max_num_timeout=settings.max_timeouts)
        executor.update_parameters(**settings.slurm(f"lra-{sweep.name}", shlex.quote(root)))
        return executor
    executor = submitit.LocalExecutor(folder, max_num_timeout=settings.max_timeouts)
    paths = f"export PYTHONPATH={shlex.quote(root)}${{PYTHONPATH:+:$PYTHONPATH}}"
    executor.update_parameters(timeout_min=settings.minutes, setup=[*settings.setup, paths])
    return executor


def _prepare(jobs: Sequence[Job], console: Console) -> None:
    """The data of every cell, once each: compute nodes have no internet, and need not wait for each other."""
    wanted = {canonical_json([job.config.task, job.config.data.root]): job.config for job in jobs}
    for config in wanted.values():
        task = tasks.build(config.task["name"], **config.task_options)
        task.prepare(Path(config.data.root), progress=console.is_terminal)


def _name_group(job: Job, name: str) -> None:
    if job.config.logger.name == "wandb" and job.config.logger.group is None:
        job.overrides = [*job.overrides, f"logger.group={name}"]


# The plan


class _Unchecked(submitit.SlurmExecutor):
    """Writes job scripts also where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def script(sweep: Sweep, settings: Settings, packs: int) -> str:
    """The job script as submitit writes it for an array of so many jobs."""
    executor = _Unchecked(sweep.folder.resolve() / "jobs", max_num_timeout=settings.max_timeouts)
    parameters = settings.slurm(f"lra-{sweep.name}", shlex.quote(str(provenance.REPOSITORY)))
    executor.update_parameters(**parameters)
    executor.parameters["map_count"] = min(packs, settings.max_jobs)
    return executor._make_submission_file_text(executor._submitit_command_str, "plan")


def _plan(sweep: Sweep, settings: Settings, packs: list[list[Job]], console: Console) -> None:
    records, _ = read_records(sweep.results_dir)
    known, unknown = [], 0
    for k, jobs in enumerate(packs):
        for job in jobs:
            seconds, basis = estimate(job.cell, records)
            known.append(seconds or 0.0)
            unknown += seconds is None
            console.print(f"job {k}: {job.cell.label}: {basis}", soft_wrap=True)
    console.print(f"{len(known)} cells in {len(packs)} jobs of at most {settings.minutes} minutes")
    hours = f"{duration(sum(known))} of computing"
    if settings.gpus:
        hours += f", {settings.gpus * sum(known) / 3600:.2f} GPU-hours"
    console.print(f"estimate: {hours}" + (f"; {unknown} cells unknown, without them" if unknown else ""))
    if packs and settings.cluster == "slurm":
        console.print(f"\n{script(sweep, settings, len(packs))}", soft_wrap=True, markup=False, highlight=False)
    console.print("nothing was submitted")


def estimate(cell: Cell, records: Sequence[Record]) -> tuple[float | None, str]:
    """Seconds that a cell will take, the median of its row's finished seeds, and in words where that comes from."""
    row = (cell.name, cell.task, cell.protocol, cell.budget)
    like = [record for record in records if record["status"] == "ok" and _row(record) == row]
    like = [record for record in like if (record.get("processes") or 1) == 1]  # else the seconds are of the last one
    seconds = [wall for record in like if (wall := (record.get("wall_s") or {}).get("total"))]
    if not seconds:
        return None, "unknown, no finished cell of this row"
    devices = sorted({record["device"]["name"] for record in like})
    return statistics.median(seconds), f"{duration(statistics.median(seconds))}, as {len(like)} on {', '.join(devices)}"


def _row(record: Record) -> tuple[str, str, str, str]:
    cell = Cell.of(record)
    return cell.name, cell.task, cell.protocol, cell.budget
