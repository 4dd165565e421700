"""Combiner attention: direct tokens and span summaries under one softmax (arXiv 2107.05768)."""

from kernels.combiner.api import PATTERNS, check_options, combiner

__all__ = ["PATTERNS", "check_options", "combiner"]
