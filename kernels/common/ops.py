"""Registration of launches as operators that torch.compile traces through without a graph break."""

from collections.abc import Callable

import torch


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
