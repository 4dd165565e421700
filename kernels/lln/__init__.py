"""Linear log-normal attention, with and without Diag."""

from kernels.lln.api import DIAGS, IMPLEMENTATIONS, lln, measure, spreads

__all__ = ["DIAGS", "IMPLEMENTATIONS", "lln", "measure", "spreads"]
