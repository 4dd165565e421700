"""Exact softmax attention over the real tokens of each sequence, padding left out."""

from kernels.softmax.api import packed_attention, refusal

__all__ = ["packed_attention", "refusal"]
