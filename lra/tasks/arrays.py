"""The arrays of a task: what they look like, and how they are made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SPLITS = ("train", "validation", "test")
"""The splits of every task, in the order in which they enter the digest."""


class Split(NamedTuple):
    """One split: arrays on disk, mapped into memory.

    tokens   (n, L) or, with two towers, (n, 2, L); uint8 or int16; cut to L, zeros after a sequence's end
    labels   (n,) uint8
    """

    tokens: np.ndarray
    labels: np.ndarray


Shapes = dict[str, tuple[int, ...]]
"""Split name to the shape of its tokens."""

Advance = Callable[[int], None]
"""Moves the progress bar by so many examples."""


@dataclass(frozen=True)
class Recipe:
    """How the arrays of a task are made; what `lra.tasks.cache` keeps on disk.

    source       what they are made from, for the record: "generate", "release", ...
    parameters   everything that changes the data, as JSON values, the task's code version among them: the cache key
    shapes       called only when the arrays must be made: the shape of each split's tokens
    fill         writes all tokens and labels into zeroed splits of these shapes
    dtype        of the tokens
    inputs       raw files that the arrays are made from; a cache made from other versions of them is made anew
    remake       whether damaged arrays are made again without asking (generated), or refused (official, downloaded)
    notes        more for `meta.json`, such as the vocabulary
    """

    source: str
    parameters: Mapping[str, Any]
    shapes: Callable[[], Shapes]
    fill: Callable[[dict[str, Split], Advance], None]
    dtype: type[np.uint8] | type[np.int16] = np.uint8
    inputs: tuple[Path, ...] = ()
    remake: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskData:
    """The prepared arrays of a task.

    splits   "train", "validation", "test"
    digest   sha256, hex, over all arrays: equal digests, equal data, wherever they come from
    source   what they were made from
    folder   where they lie
    """

    splits: dict[str, Split]
    digest: str
    source: str
    folder: Path

    @property
    def counts(self) -> dict[str, int]:
        """Examples in each split."""
        return {name: len(split.labels) for name, split in self.splits.items()}
