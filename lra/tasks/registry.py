"""Names to tasks: a task registers itself, and its variants, by being in this folder."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from lra.errors import UserError
from lra.tasks.base import Task

_registry: dict[str, tuple[type[Task], dict[str, Any]]] = {}


def register(name: str, **variants: dict[str, Any]) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: makes `name` buildable, and each variant as the same class with other defaults.

    `@register("pathfinder", pathx={"size": 128})`
    """

    def decorate(cls: type[Task]) -> type[Task]:
        for variant, defaults in {name: {}, **variants}.items():
            known, _ = _registry.get(variant, (cls, {}))
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"task {variant!r} is registered by both {known.__module__} and {cls.__module__}")
            _registry[variant] = (cls, defaults)
        return cls

    return decorate


def _discover() -> None:
    import lra.tasks

    for module in pkgutil.iter_modules(lra.tasks.__path__):
        importlib.import_module(f"lra.tasks.{module.name}")


def _lookup(name: str) -> tuple[type[Task], dict[str, Any]]:
    _discover()
    if name not in _registry:
        raise UserError(f"task={name} is unknown; known: {', '.join(sorted(_registry))}")
    return _registry[name]


def names() -> list[str]:
    """All buildable names, sorted."""
    _discover()
    return sorted(_registry)


def options(name: str) -> dict[str, Any]:
    """The options of a task with the defaults that hold for `name`."""
    cls, overridden = _lookup(name)
    return {key: overridden.get(key, p.default) for key, p in inspect.signature(cls).parameters.items()}


def build(name: str, **task_options: Any) -> Task:
    """Build the task `name`; UserError names an unknown or impossible option, see `options(name)`."""
    cls, overridden = _lookup(name)
    allowed = options(name)
    for key in task_options:
        if key not in allowed:
            raise UserError(f"task.{key} is not an option of {name}; options: {', '.join(allowed) or 'none'}")
    task = cls(**{**overridden, **task_options})
    task.name = name
    return task
