"""Names to classes, for whatever registers itself by being a file in a folder: attentions, tasks.

It lies in the lowest layer, and needs no torch, so that naming the tasks does not load it.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Class = TypeVar("Class", bound=type[Any])


class Registry(Generic[T]):
    """Classes by name, each registered by a module of one package, and built with options that are checked by name.

    kind      what is registered, as messages call it: "attention" in `attention=foo is unknown`
    package   every module in it is imported before the first look-up
    common    arguments that are not options
    error     what an unknown name or option raises
    """

    def __init__(self, kind: str, package: str, common: tuple[str, ...] = (), error: type[Exception] = ValueError):
        self.kind, self.package, self.common, self.error = kind, package, common, error
        self.entries: dict[str, tuple[type[Any], dict[str, Any]]] = {}

    def register(self, name: str, **variants: dict[str, Any]) -> Callable[[Class], Class]:
        """Class decorator: makes `name` buildable, and each variant as the same class with other defaults.

        `@register("lln", lln_diag={"diag": "average"})`
        """

        def decorate(cls: Class) -> Class:
            for variant, defaults in {name: {}, **variants}.items():
                known, _ = self.entries.get(variant, (cls, {}))
                if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                    both = f"{known.__module__} and {cls.__module__}"
                    raise ValueError(f"{self.kind} {variant!r} is registered by both {both}")
                self.entries[variant] = (cls, defaults)
            return cls

        return decorate

    def names(self) -> list[str]:
        """All buildable names, variants included, sorted."""
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        return sorted(self.entries)

    def options(self, name: str) -> dict[str, Any]:
        """The options of `name`, with the defaults that hold for it; raises `error` for an unknown name."""
        known = self.names()
        if name not in known:
            raise self.error(f"{self.kind}={name} is unknown; known: {', '.join(known)}")
        cls, overridden = self.entries[name]
        parameters = inspect.signature(cls).parameters
        return {key: overridden.get(key, p.default) for key, p in parameters.items() if key not in self.common}

    def build(self, name: str, *, common: dict[str, Any] | None = None, **options: Any) -> T:
        """An instance of `name`; raises `error` for an unknown name or option, and what the class itself raises."""
        allowed = self.options(name)
        for key in options:
            if key not in allowed:
                known = ", ".join(allowed) or "none"
                raise self.error(f"{self.kind}.{key} is not an option of {name}; options: {known}")
        cls, overridden = self.entries[name]
        return cls(**(common or {}), **{**overridden, **options})
