"""What a cell answers to each test item: `predictions.npz` beside its record, some kilobytes, deterministic."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lra.errors import UserError
from lra.record import Cell, Record, write_bytes

FILENAME = "predictions.npz"


@dataclass(frozen=True)
class Predictions:
    """Classes (n,) of the test items in the order of their split: the true ones, and the model's arg max.

    best, last   of the best validation, and of the last step
    """

    labels: np.ndarray
    best: np.ndarray
    last: np.ndarray

    def right(self, which: str = "best") -> np.ndarray:
        """Which items (n,) the model of `best` or `last` got right."""
        return getattr(self, which) == self.labels


def write(directory: Path, made: Predictions) -> None:
    """Write the file of a cell, whole or not at all; classes as the smallest integers that hold them."""
    packed = {name: array.astype(np.min_scalar_type(int(array.max()))) for name, array in vars(made).items()}
    file = io.BytesIO()
    np.savez_compressed(file, **packed)
    write_bytes(directory / FILENAME, file.getvalue())


def read(results_dir: str | Path, record: Record) -> Predictions:
    """The predictions of a finished cell; UserError where they are missing, damaged, or not those of its record."""
    path = Cell.of(record).directory(results_dir) / FILENAME
    try:
        with np.load(path) as arrays:
            made = Predictions(**{name: arrays[name] for name in Predictions.__dataclass_fields__})
        right = {which: int(made.right(which).sum()) for which, count in record["test"].items() if count}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the cell is older than such files; rerun=true makes one") from None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); rerun=true makes it again") from error
    counts = {which: {"correct": right[which], "total": len(made.labels)} for which in right}
    if any(not counts[which].items() <= record["test"][which].items() for which in counts):
        raise UserError(f"{path} does not belong to the record beside it; rerun=true makes both again")
    return made
