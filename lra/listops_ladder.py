"""The command of `scripts/ladder.py`: the ladder of ListOps, and how far up it a trained cell stands."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from lra import predictions, stats, tasks
from lra.errors import UserError
from lra.lens.trained import read_cell
from lra.record import Cell, digest_of
from lra.tasks import Split, TaskData
from lra.tasks.listops.ladder import Rung, by_depth, by_length, climb

TRAINING = 20_000
"""Expressions whose labels the predictors count."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 done, 2 a mistake in it, which is one line."""
    parser = argparse.ArgumentParser("scripts/ladder.py", description="Accuracy on ListOps by structure understood.")
    add = parser.add_argument
    add("data_root", nargs="?", default="results/data", type=Path, help="default: results/data")
    add("--cell", type=Path, metavar="DIR", help="a trained cell, results/runs/…/seed0: by depth and by length")
    request = parser.parse_args(arguments)
    try:
        lines = of_cell(request.cell, request.data_root) if request.cell else of_predictors(request.data_root)
        print("\n".join(lines))
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return 2
    return 0


def of_predictors(data_root: Path) -> list[str]:
    """A line for each predictor that knows so much and no more."""
    data = tasks.build("listops").prepare(data_root, progress=sys.stderr.isatty())
    train = Split(*(array[:TRAINING] for array in data.splits["train"]))
    return [f"ListOps {_test(data)}; a predictor that knows …", *_lines(climb(train, data.splits["test"]))]


def of_cell(directory: Path, data_root: Path) -> list[str]:
    """A line for the test items of each depth and of each length: how many of them the cell gets right."""
    record = read_cell(directory)
    cell = Cell.of(record)
    if cell.task != "listops":
        raise UserError(f"cell={directory} is of task={cell.task}; the ladder is that of listops")
    data = tasks.build(**record["config"]["task"]).prepare(data_root, progress=sys.stderr.isatty())
    if data.digest != digest_of(record):
        raise UserError(f"cell={directory} saw data {digest_of(record)[:12]}, {data_root} has {data.digest[:12]}")
    home = Path(*directory.absolute().parts[: -len(cell.directory("").parts)])
    right = predictions.read(home, record).right()
    try:
        depths = list(by_depth(data.splits["test"], right))
    except ValueError as error:
        raise UserError(f"cell={directory}: {error}") from None
    return [
        f"{cell.label}: {100 * right.mean():.1f} % of ListOps {_test(data)}; of those whose value follows from …",
        *_lines(depths),
        "of those with so many tokens",
        *_lines(by_length(data.splits["test"], right)),
    ]


def _test(data: TaskData) -> str:
    return f"{data.digest[:12]}, {data.counts['test']:,} test items"


def _lines(rungs: Iterable[Rung]) -> list[str]:
    lines = []
    for rung in rungs:
        low, high = stats.wilson_interval(rung.correct, rung.total)
        interval = f"({low:.1f} to {high:.1f})"
        lines.append(f"{100 * rung.accuracy:6.1f} %  {interval:<15} {rung.total:6,}  {rung.knows}")
    return lines
