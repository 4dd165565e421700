"""Pathfinder and Path-X: task, generator, reader of the official folders."""

from lra.tasks.pathfinder.task import Pathfinder

__all__ = ["Pathfinder"]
