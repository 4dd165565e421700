"""Registration of launches as operators that torch.compile traces through without a graph break."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch


def sources_digest(folder: Path) -> str:
    """16 hexadecimal digits that change with the name or the text of any Python file under `folder`."""
    sha = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        sha.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return sha.hexdigest()[:16]


# Inductor's cache on disk knows an operator by its name alone: a graph kept there would go on with the shapes that an
# older `fake` promised. A change of the kernels asks for new graphs.
torch.compiler.config.cache_key_tag += f" lra kernels {sources_digest(Path(__file__).parents[1])}"


def register_op(name: str, schema: str, run: Callable, fake: Callable) -> Callable:
    """Make `run` the operator lra::name and return it.

    schema   arguments and results, as in `torch.library.define`
    fake     the same call on tensors without data: shapes, strides and dtypes of what `run` returns
    """
    qualified = f"lra::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, ("cpu", "cuda"), run)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.lra, name).default


def refuse_create_graph() -> None:
    """RuntimeError where the gradient of a backward pass of launches is asked for: it would come out as zero."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the kernels of attention.impl=triton have no second derivative: create_graph=True needs "
            "attention.impl=reference"
        )
