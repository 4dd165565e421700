"""What calls launch, compiled ahead of them: left to itself Triton compiles a kernel where a call first needs it."""

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver


class Variant(NamedTuple):
    """A kernel for one set of constants, argument types and options, as Triton compiles it. It can be pickled.

    Two variants with the same module, kernel and key are one.
    """

    module: str
    kernel: str
    key: str  # Triton's own, of everything below
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]
    target: GPUTarget

    def compile(self) -> None:
        """Into Triton's cache on disk, with the C code that launches it; without a context on the device."""
        function = getattr(importlib.import_module(self.module), self.kernel)
        source = ASTSource(function, self.signature, self.constants, self.attributes)
        kernel = triton.compile(source, target=self.target, options=self.options)
        active: Any = driver.active
        active.launcher_cls(kernel.src, kernel.metadata)


def variants(call: Callable[[], object]) -> list[Variant]:
    """What `call` launches of kernels that this process has not compiled; nothing is compiled or launched.

    What kernels would have written stays as it was allocated, so that `call` must take nothing for an index.
    """
    found: dict[tuple[str, str, str], Variant] = {}
    target: Any = driver.active.get_current_target()

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        same = fn.module, fn.name, key
        if same not in found:
            options = json.loads(compile["specialization_data"])["options"]
            options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
            signature, constants, (attributes,) = (compile[name] for name in ("signature", "constants", "configs"))
            found[same] = Variant(*same, signature, constants, attributes, options, target)
        return True  # Triton need not compile it

    with _unlaunched(note):
        call()
    return list(found.values())


@contextlib.contextmanager
def _unlaunched(hook: Callable[..., bool]) -> Iterator[None]:
    """Kernels are not launched, compiled ones either, and `hook` is asked before any is compiled."""
    run, before = triton.JITFunction.run, knobs.runtime.jit_cache_hook

    def warm_up(self, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.JITFunction.run, knobs.runtime.jit_cache_hook = warm_up, hook
    try:
        yield
    finally:
        triton.JITFunction.run, knobs.runtime.jit_cache_hook = run, before
