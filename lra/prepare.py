"""From the command line of `scripts/prepare.py` to prepared data and a table of it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lra import cli, tasks
from lra import config as configuration
from lra.errors import UserError
from lra.tasks import TaskData

CONF = Path(__file__).parents[1] / "conf"

USAGE = """\
python scripts/prepare.py [task=NAME,...] [key=value ...]

Prepares the data of these tasks, of all that can be had without the internet by default, and prints where each comes
from. Keys are those of run.py: data.root, protocol, budget, task.source, ...
  task=all       every task; those of the hub are downloaded"""

OFFLINE = ("listops", "pathfinder", "text_reviews", "image_fashion", "retrieval_manuals")
"""What `make data` prepares: a table of accuracies needs no more, and none of it needs the hub."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its data, or one line that says what is missing."""

    task: str
    data: TaskData | None
    problem: str = ""


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 all prepared, 1 some data is missing, 2 a mistake in the command, which is one line."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    console = Console()
    try:
        names, overrides = parse(arguments)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = {name: compose("config", overrides=[f"task={name}", *overrides]) for name in names}
        configs = {name: configuration.load(config) for name, config in composed.items()}
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(cli.explain(error), file=sys.stderr)
        return 2
    outcomes = []
    for number, (name, config) in enumerate(configs.items(), 1):
        if not console.is_terminal:  # where bars show nothing, a line says what takes its time
            console.print(f"preparing {name}, {number} of {len(configs)} …")
        outcomes.append(prepare(name, config, console.is_terminal))
    show(outcomes, console)
    return int(any(outcome.data is None for outcome in outcomes))


def parse(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tasks, and the other overrides."""
    chosen = [argument.partition("=")[2] for argument in arguments if argument.startswith("task=")]
    names = [name for choice in chosen for name in choice.split(",")] or list(OFFLINE)
    names = tasks.names() if names == ["all"] else names
    for name in names:
        tasks.options(name)
    return names, [argument for argument in arguments if not argument.startswith("task=")]


def prepare(name: str, config: configuration.Config, progress: bool) -> Outcome:
    try:
        task = tasks.build(name, **config.task_options)
        return Outcome(name, task.prepare(Path(config.data.root), progress))
    except UserError as error:
        return Outcome(name, None, str(error))


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """A table of what is there, digests cut to 12 digits, and below it a line for what is not."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("task", "source", "train", "validation", "test", "digest"):
        counted = column in tasks.SPLITS
        table.add_column(column, justify="right" if counted else "left", no_wrap=True)
    for outcome in outcomes:
        if outcome.data is None:
            table.add_row(outcome.task, Text("missing", style="bold red"))
            continue
        counts = [f"{outcome.data.counts[split]:,}" for split in tasks.SPLITS]
        table.add_row(outcome.task, outcome.data.source, *counts, outcome.data.digest[:12])
    console.print(table)
    for outcome in outcomes:
        if outcome.data is None:
            console.print(Text(f"{outcome.task}: {outcome.problem}"))
