"""ListOps: task, generator, reader of the official files, and a label evaluator of its own."""

from lra.tasks.listops.task import ListOps

__all__ = ["ListOps"]
