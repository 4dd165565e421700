"""The baseline: PyTorch's exact attention by the fastest path on this device and shape.

That is one of the fused backends of `scaled_dot_product_attention`, or, with a padding mask, flash attention over the
real tokens alone.
"""

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attention import Attention
from kernels.softmax import packed_attention

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""The exact backends of SDPA that never hold the N × N matrix."""

VARLEN = "varlen"

ANCHOR_SHAPE, ANCHOR_TOKENS, ANCHOR_DTYPE = (2, 32), 131_072, "bfloat16"
ANCHORS = {"H100": {1024: 0.60, 4096: 2.04, 16384: 7.77}}
"""Forward + backward of SDPA, no mask, in ms by length, on a card in good order, by a part of the card's name."""

MARGIN = 1.10


class SDPA(Attention):
    """softmax(q kᵀ / √D) v by one backend, with nothing around it: no change of layout, no zeroing of padded rows.

    The registered `softmax` adds both, for the contract; the baseline of a ratio is the bare call.
    """

    def __init__(self, backend: str, num_heads: int, head_dim: int, max_length: int):
        super().__init__(num_heads, head_dim, max_length)
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        visible = None if key_mask is None else key_mask[:, None, None, :]
        with sdpa_kernel(BACKENDS[self.backend]) if self.backend in BACKENDS else contextlib.nullcontext():
            return scaled_dot_product_attention(q, k, v, attn_mask=visible)


class Packed(Attention):
    """softmax(q kᵀ / √D) v over the real tokens alone, brought together and back; only with a key mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if key_mask is None:
            raise ValueError(f"{VARLEN} needs a key mask")
        return packed_attention(q, k, v, key_mask)


def build(name: str, num_heads: int, head_dim: int, max_length: int) -> Attention:
    """The exact attention `name`, one of `paths`."""
    if name == VARLEN:
        return Packed(num_heads, head_dim, max_length)
    return SDPA(name, num_heads, head_dim, max_length)


def paths(device: torch.device, masked: bool) -> tuple[str, ...]:
    """What there is to choose from; on a CPU SDPA's own choice."""
    if device.type != "cuda":
        return ("default",)
    return (*BACKENDS, VARLEN) if masked else tuple(BACKENDS)


@contextlib.contextmanager
def quiet():
    """Without the reasons that PyTorch gives, one warning each, why a backend does not take a call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def anchors(device_name: str) -> Mapping[int, float]:
    """Length to the time of forward + backward that is known of the device; empty for an unknown one."""
    return next((times for part, times in ANCHORS.items() if part in device_name), {})


def anchor_of(row: Mapping[str, Any]) -> float | None:
    """The known time of the baseline of a row (heads, head_dim, tokens, dtype, masked, length, device), or None."""
    shape = (row["heads"], row["head_dim"]), row["tokens"], row["dtype"]
    if shape != (ANCHOR_SHAPE, ANCHOR_TOKENS, ANCHOR_DTYPE) or row["masked"]:
        return None
    return anchors(row["device"]).get(row["length"])


def sane(measured_ms: float, anchor_ms: float) -> bool:
    """A baseline may be faster than known, but not more than a tenth slower: ratios to it would flatter."""
    return measured_ms <= MARGIN * anchor_ms
