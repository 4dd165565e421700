"""The tasks of the arena: one file (or folder) a task, one contract for all.

    task = tasks.build("listops", seed=0)
    data = task.prepare(Path("data"))
    data.splits["train"].tokens    # (96000, 2000) uint8, memory-mapped, 0 = padding

See `lra.tasks.base.Task` for the contract.
"""

from lra.tasks.arrays import SPLITS, Recipe, Split, TaskData
from lra.tasks.base import Task
from lra.tasks.registry import build, names, options, register

__all__ = ["SPLITS", "Recipe", "Split", "Task", "TaskData", "build", "names", "options", "register"]
