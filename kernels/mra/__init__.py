"""Multi Resolution Analysis attention, MRA-2 and MRA-2-s (arXiv 2207.10284)."""

from kernels.mra.api import IMPLEMENTATIONS, check_options, mra_attention, preference, select

__all__ = ["IMPLEMENTATIONS", "check_options", "mra_attention", "preference", "select"]
