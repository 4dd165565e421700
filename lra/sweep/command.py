"""The command line of `scripts/sweep.py`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict
from rich.console import Console

from lra import cli, provenance
from lra import config as configuration
from lra.errors import UserError
from lra.launcher import Job
from lra.sweep import manifest, states, submission
from lra.sweep.manifest import Entry, Sweep
from lra.sweep.settings import Settings

CONF = provenance.REPOSITORY / "conf"
HALVED = "trainer.accumulate"
"""The key that splits a step into micro-batches: twice the parts, half the memory, the same batch."""


def main(arguments: Sequence[str], run: Callable[[], object]) -> int:
    """Run the command; `run` is Hydra's main of `run.py`, which composes the grid of a `submit`."""
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "submit":
        sys.argv = ["run.py", "-m", *_submit(chosen, rest)]
        try:
            return cli.guard(run)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
    if rest:
        parser.error(f"{rest[0]} is no argument of {chosen.command}")
    return cli.guard(lambda: _look_after(chosen))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/sweep.py", description="Sweeps on a cluster: submit and leave.")
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser("submit", help="submit a grid as one array of jobs and return")
    submit.add_argument("--plan", action="store_true", help="show cells, time, GPU-hours, job script; submit nothing")
    submit.add_argument("--name", help="of the sweep; default: date and time")
    submit.epilog = "All other arguments are those of run.py: attention=softmax,mra task=listops seed=0,1,2"
    for name, text in (
        ("status", "the state of every cell"),
        ("collect", "the tables from what is there; exit code 0 only if every cell is ok"),
        ("retry", "submit again what failed or was lost"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("name", nargs="?", help="of the sweep; default: the latest")
        command.add_argument("--results-dir", type=Path, default=Path("results"), help="default: results")
        if name == "retry":
            how = "halve: cells that ran out of memory get micro-batches of half the size, the batch stays"
            command.add_argument("--oom", choices=("again", "halve"), default="again", help=how)
    return parser


def _submit(chosen: argparse.Namespace, rest: list[str]) -> list[str]:
    own = ["hydra.launcher.wait=false", f"hydra.launcher.plan={'true' if chosen.plan else 'false'}"]
    own += [f"hydra.launcher.name={chosen.name}"] if chosen.name else []
    named = any(argument.startswith("hydra/launcher=") for argument in rest)
    return [*([] if named else ["hydra/launcher=slurm"]), *own, *rest]


def _look_after(chosen: argparse.Namespace) -> None:
    sweep, console = manifest.read(chosen.results_dir, chosen.name), Console()
    if chosen.command == "status":
        states.show(sweep, states.of(sweep), console)
    elif chosen.command == "collect":
        if not states.collect(sweep, console):
            raise cli.CellFailedError
    else:
        retry(sweep, halve=chosen.oom == "halve", console=console)


def retry(sweep: Sweep, *, halve: bool, console: Console) -> None:
    """Submit every cell again that is neither ok nor alive, as further jobs of the sweep.

    A cell that was stopped continues from its last checkpoint. One that is halved is another cell: its row carries
    `trainer.accumulate`, and the record of the one that ran out of memory stays.
    """
    failed = [state for state in states.of(sweep) if state.what != "ok" and not state.alive]
    jobs = []
    for state in failed:
        overrides = [override for override in state.entry.overrides if not override.startswith("rerun=")]
        if halve and state.what == "oom":
            overrides = _halved(state.entry, overrides)
            state.entry.replaced = True
        jobs.append(job_of(overrides))
    if not jobs:
        console.print("nothing to retry")
        return
    settings = replace(Settings(**sweep.settings), wait=False)
    # Cells that run again unchanged leave their old place in the sweep to the new one.
    for state in failed:
        state.entry.replaced = True
    submission.submit(sweep, submission.pack(jobs, settings.cells_per_job), settings, console)


def _halved(entry: Entry, overrides: list[str]) -> list[str]:
    """The command of a cell with twice as many micro-batches; UserError where the batch has no such parts."""
    parts = [int(o.partition("=")[2]) for o in overrides if o.startswith(f"{HALVED}=")]
    doubled = 2 * (parts[-1] if parts else 1)
    kept = [override for override in overrides if not override.startswith(f"{HALVED}=")]
    try:
        job_of([*kept, f"{HALVED}={doubled}"])
    except UserError as error:
        raise UserError(f"{entry.cell.label} cannot be halved: {error}") from error
    return [*kept, f"{HALVED}={doubled}"]


def job_of(overrides: Sequence[str]) -> Job:
    """The checked cell of a command line of `run.py`; raises what a mistake in it raises."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", list(overrides), return_hydra_config=True)
        choices = composed.hydra.runtime.choices
        with open_dict(composed):
            del composed["hydra"]
        config = configuration.load(composed)
        cell, starred = cli.identify(composed, choices)
    return Job(cell, starred, list(overrides), config)
