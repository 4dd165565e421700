"""Names to tasks: a task registers itself, and its variants, by being in this folder."""

from typing import Any

from kernels.common.registry import Registry
from lra.errors import UserError
from lra.tasks.base import Task

tasks = Registry[Task]("task", "lra.tasks", error=UserError)
register, names, options = tasks.register, tasks.names, tasks.options


def build(name: str, **task_options: Any) -> Task:
    """Build the task `name`; UserError names an unknown or impossible option, see `options(name)`."""
    task = tasks.build(name, **task_options)
    task.name = name
    return task
