"""Where a task's raw data may come from: the choice among its sources."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lra.errors import UserError
from lra.tasks import cache
from lra.tasks.arrays import Recipe


@dataclass(frozen=True)
class Source:
    """One way to the raw data.

    recipe    how to make the arrays of it; its `shapes` may fetch what is not on disk
    at_hand   whether the raw data is on disk
    missing   one line that says what to get, and where to put it, if it is not; None: it can be made or fetched
    """

    recipe: Recipe
    at_hand: bool = False
    missing: str | None = None


def choose(root: Path, task: str, wanted: str, sources: Mapping[str, Source]) -> Recipe:
    """The recipe of the source `wanted`; UserError if its raw data is neither prepared, nor on disk, nor obtainable.

    `auto` takes the first source that is prepared or on disk (raw files may be gone once the arrays are made), else
    the first that can be had.
    """
    considered = dict(sources) if wanted == "auto" else {wanted: sources[wanted]}
    for source in considered.values():
        if source.at_hand or cache.location(root, task, source.recipe).exists():
            return source.recipe
    for source in considered.values():
        if source.missing is None:
            return source.recipe
    raise UserError(f"task.source={wanted}: " + "; or ".join(s.missing for s in considered.values() if s.missing))
