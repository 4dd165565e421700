"""The contract that every task keeps."""

from abc import ABC, abstractmethod
from pathlib import Path

from lra.tasks import cache
from lra.tasks.arrays import Recipe, TaskData


class Task(ABC):
    """A classification task over token sequences.

    name          the registered name; two names never share a cache
    num_classes   labels are 0 … num_classes − 1
    vocab_size    token ids are 0 … vocab_size − 1, the padding id 0 included
    max_length    L: longer sequences were cut to it; a model may pad further
    two_towers    an example is a pair of sequences
    grid          (height, width) where the sequence is a row-major image, else None

    The options of a task are the keyword arguments of its class; all have defaults, and an impossible value raises
    UserError naming `task.<option>`. A task without options to keep is free to set the fields as class attributes.
    """

    name: str = ""
    num_classes: int
    vocab_size: int
    max_length: int
    two_towers: bool = False
    grid: tuple[int, int] | None = None

    @abstractmethod
    def recipe(self, root: Path) -> Recipe:
        """How to make the arrays, given the data folder; UserError where raw data is missing."""

    def prepare(self, root: Path, progress: bool = True) -> TaskData:
        """Find the arrays under `root`, or make them there; checked against their digest either way.

        Safe when several processes prepare at once. UserError for missing raw data, damaged official data, a
        folder that cannot be written, a full disk.
        """
        return cache.find_or_make(root, self.name, self.recipe(root), progress)
