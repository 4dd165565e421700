"""What the pictures of a leaderboard share: which rows stand together, how they are called, what a picture is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = "plots"
"""Where pictures lie below the results folder."""

SCOPE = ["protocol", "budget", "device"]
PANEL = ["task", "data_digest"]
"""What a picture and a panel of it never mix."""

LONGEST_NAME = 36


class Picture(NamedTuple):
    """A picture on disk, `path`.svg and `path`.png, and what it shows."""

    path: Path
    title: str
    caption: str


def scopes(leaderboard: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    """(protocol, budget, device) and its rows with an accuracy, in the order of the table."""
    for scope, rows in leaderboard[leaderboard["n_seeds"] > 0].groupby(SCOPE, sort=True):
        protocol, budget, device = (str(part) for part in scope)  # type: ignore[union-attr]
        yield (protocol, budget, device), rows.assign(name=[*map(name_of, rows["attention"], rows["overrides"])])


def panels(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A title and the rows of each task; of each data set, where a task was run on several."""
    groups = [(key, group) for key, group in rows.groupby(PANEL, sort=True)]
    tasks = [str(key[0]) for key, _ in groups]  # type: ignore[index]
    return [
        (task if tasks.count(task) == 1 else f"{task}, data {key[1][:8]}", group)  # type: ignore[index]
        for task, (key, group) in zip(tasks, groups, strict=True)
    ]


def name_of(attention: str, overrides: str) -> str:
    """`adamra (rates=[8,32,128])` for `adamra+125ef9f7`; the hash stays where the overrides are too many to read."""
    if not overrides:
        return attention
    plain = (f"{key.removeprefix('attention.')}={_short(value)}" for key, value in json.loads(overrides).items())
    base, _, hash_and_star = attention.partition("+")
    name = f"{base} ({', '.join(plain)}){'*' if hash_and_star.endswith('*') else ''}"
    return name if len(name) <= LONGEST_NAME else attention


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def title_of(protocol: str, budget: str, device: str) -> str:
    """The line above a picture."""
    return f"protocol {protocol}, budget {budget}, {device}"


def grid(figure: Figure, count: int) -> list[Axes]:
    """Axes for so many panels, row by row."""
    axes: Any = figure.subplots(*shape(count), squeeze=False)
    for unused in axes.flat[count:]:
        unused.remove()
    return list(axes.flat[:count])


def shape(count: int) -> tuple[int, int]:
    """Rows and columns of such a grid: three panels in a row, or two where that leaves fewer gaps."""
    columns = 2 if count == 4 else min(3, count)
    return -(-count // columns), columns
