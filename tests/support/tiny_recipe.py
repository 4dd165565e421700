"""A data set of a few numbers, to try the cache with.

As a program, `python tiny_recipe.py ROOT LOG [SECONDS]`: prepares it under ROOT, adds a line to LOG each time the
arrays are really made, which then takes so many seconds, and prints the digest.
"""

import sys
import time
from pathlib import Path

import numpy as np

from lra.tasks import cache
from lra.tasks.arrays import Advance, Recipe, Split

COUNTS = {"train": 6, "validation": 2, "test": 3}


def tiny(
    parameter: int = 0,
    *,
    remake: bool = True,
    inputs: tuple[Path, ...] = (),
    log: Path | None = None,
    seconds: float = 0,
) -> Recipe:
    """Pairs of int16 sequences: row r of a split holds 1000·parameter + r, its label is r."""

    def fill(splits: dict[str, Split], advance: Advance) -> None:
        if log:
            with log.open("a") as file:
                file.write("made\n")
        for split in splits.values():
            time.sleep(seconds / len(splits))
            rows = np.arange(len(split.labels))
            split.tokens[:] = 1000 * parameter + rows[:, None, None]
            split.labels[:] = rows
            advance(len(rows))

    return Recipe(
        source="tiny",
        parameters={"parameter": parameter},
        shapes=lambda: {name: (count, 2, 5) for name, count in COUNTS.items()},
        fill=fill,
        dtype=np.int16,
        inputs=inputs,
        remake=remake,
        notes={"vocabulary": ["a"]},
    )


if __name__ == "__main__":
    root, log, *seconds = sys.argv[1:]
    recipe = tiny(log=Path(log), seconds=float(seconds[0]) if seconds else 0)
    print(cache.find_or_make(Path(root), "tiny", recipe, progress=False).digest)
