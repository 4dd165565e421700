"""Names to modules: a method registers itself, and its variants, by being a file in this folder."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from attention.base import Attention

COMMON = ("num_heads", "head_dim", "max_length", "causal", "impl")
"""Arguments that every attention takes; all others are the method's own options."""

_registry: dict[str, tuple[type[Attention], dict[str, Any]]] = {}


def register(name: str, **variants: dict[str, Any]) -> Callable[[type[Attention]], type[Attention]]:
    """Class decorator: makes `name` buildable, and each variant as the same class with other defaults.

    `@register("lln", lln_diag={"diag": "average"})`
    """

    def decorate(cls: type[Attention]) -> type[Attention]:
        for variant, defaults in {name: {}, **variants}.items():
            known, _ = _registry.get(variant, (cls, {}))
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"attention {variant!r} is registered by both {known.__module__} and {cls.__module__}")
            _registry[variant] = (cls, defaults)
        return cls

    return decorate


def _discover() -> None:
    import attention

    for module in pkgutil.iter_modules(attention.__path__):
        importlib.import_module(f"attention.{module.name}")


def _lookup(name: str) -> tuple[type[Attention], dict[str, Any]]:
    _discover()
    if name not in _registry:
        raise ValueError(f"attention={name} is unknown; known: {', '.join(sorted(_registry))}")
    return _registry[name]


def names() -> list[str]:
    """All buildable names, methods and variants, sorted."""
    _discover()
    return sorted(_registry)


def options(name: str) -> dict[str, Any]:
    """The options of an attention beyond the common arguments, with the defaults that hold for `name`."""
    cls, overridden = _lookup(name)
    parameters = inspect.signature(cls).parameters
    return {key: overridden.get(key, p.default) for key, p in parameters.items() if key not in COMMON}


def build(
    name: str,
    *,
    num_heads: int,
    head_dim: int,
    max_length: int,
    causal: bool = False,
    impl: str = "auto",
    **method_options: Any,
) -> Attention:
    """Build the attention `name`.

    num_heads, head_dim   H and D of the inputs it will see
    max_length            longest N it will see; sizes parameters that depend on the length
    causal                position i attends to j <= i; refused in one line where a method has no causal form
    impl                  "auto" (Triton on CUDA, else reference) | "reference" | "triton"
    method_options        the method's own, see `options(name)`; ValueError names an unknown or impossible one
    """
    cls, overridden = _lookup(name)
    allowed = options(name)
    for key in method_options:
        if key not in allowed:
            raise ValueError(f"attention.{key} is not an option of {name}; options: {', '.join(allowed) or 'none'}")
    common = dict(num_heads=num_heads, head_dim=head_dim, max_length=max_length, causal=causal, impl=impl)
    return cls(**common, **{**overridden, **method_options})
