"""Which implementation of a method runs."""

import torch
from torch import Tensor

MAX_HEAD_DIM = 128
NATIVE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels take, on a GPU."""


def check_impl(impl: str, available: tuple[str, ...], method: str) -> None:
    """Raise ValueError, in one line, for an implementation that `method` does not have."""
    if impl not in ("auto", *available):
        raise ValueError(
            f"attention.impl={impl} is not available for {method}; use one of auto, {', '.join(available)}"
        )


def resolve_impl(impl: str, device: torch.device, available: tuple[str, ...]) -> str:
    """The implementation that runs on `device`: "auto" is Triton on CUDA where there are kernels."""
    if impl != "auto":
        return impl
    return "triton" if device.type == "cuda" and "triton" in available else "reference"


def choose_impl(impl: str, q: Tensor, available: tuple[str, ...], method: str, refusal: str | None = None) -> str:
    """The implementation of one call; `refusal` says why the kernels cannot take it, or is None.

    "auto" takes the reference where the kernels cannot; an explicit "triton" is then refused in one line.
    """
    check_impl(impl, available, method)
    chosen = resolve_impl(impl, q.device, available)
    if chosen != "triton":
        return chosen
    refusal = refusal or _refusal(q)
    if refusal is None:
        return chosen
    if impl == "auto":
        return "reference"
    raise ValueError(f"attention.impl=triton of {method} {refusal}; use attention.impl=reference")


def _refusal(q: Tensor) -> str | None:
    from kernels.common.launch import INTERPRETED  # Triton is needed only here

    if q.shape[0] == 0:
        return "takes at least one sequence, got none"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"takes head_dim <= {MAX_HEAD_DIM}, got {q.shape[-1]}"
    if q.device.type != "cuda" and not INTERPRETED:
        return f"needs a CUDA device, got {q.device.type} (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    if q.dtype not in NATIVE_DTYPES and not INTERPRETED:
        return f"takes bfloat16, float16 and float32, got {q.dtype}"
    return None
