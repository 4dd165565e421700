"""Combiner attention: direct tokens and span summaries under one softmax (arXiv 2107.05768)."""

from kernels.combiner.api import IMPLEMENTATIONS, PATTERNS, check_options, combiner, kernels_refuse

__all__ = ["IMPLEMENTATIONS", "PATTERNS", "check_options", "combiner", "kernels_refuse"]
