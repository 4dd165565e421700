"""Which implementation of a method runs."""

import torch

IMPLS = ("auto", "reference", "triton")


def check_impl(impl: str, available: tuple[str, ...], method: str) -> None:
    """Raise ValueError, in one line, for an implementation that `method` does not have."""
    if impl not in ("auto", *available):
        raise ValueError(
            f"attention.impl={impl} is not available for {method}; use one of auto, {', '.join(available)}"
        )


def resolve_impl(impl: str, device: torch.device, available: tuple[str, ...]) -> str:
    """The implementation that runs on `device`: "auto" is Triton on CUDA where it exists, else the reference."""
    if impl != "auto":
        return impl
    return "triton" if device.type == "cuda" and "triton" in available else "reference"
