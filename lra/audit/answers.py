"""Whether a model knows more than a shortcut: how many of its answers are right where the shortcut is wrong."""

import sys
from collections.abc import Iterator

import numpy as np

from lra import predictions
from lra.config import Config
from lra.errors import UserError
from lra.record import Cell, digest_of, read_records


def of_cells(config: Config, digest: str, shortcut: str, right: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The answers of every finished cell that saw these data, apart where a shortcut is right and where it is wrong.

    config   of its results_dir the cells of its protocol and budget count
    right    (n,): which test items the shortcut guesses right
    yields   a name, and which of those items the cell answers right (best checkpoint); two for each cell, if
             there are items of both kinds
    """
    for record in read_records(config.results_dir)[0]:
        cell = Cell.of(record)
        here = (cell.protocol, cell.budget) == (config.protocol.name, config.budget.name)
        if record["status"] != "ok" or digest_of(record) != digest or not here:
            continue
        try:
            answered = predictions.read(config.results_dir, record).right()
        except UserError as missing:
            print(missing, file=sys.stderr)
            continue
        yield from apart(f"{cell.name} seed{cell.seed}", answered, shortcut, right)


def apart(name: str, answered: np.ndarray, shortcut: str, right: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Which of its answers are right, apart where the shortcut is right and where it is wrong, if there are both."""
    for word, part in (("right", right), ("wrong", ~right)):
        if part.any():
            yield f"{name}, {shortcut} {word}", answered[part]
