"""Linear log-normal attention, with and without Diag."""

from kernels.lln.api import DIAGS, IMPLEMENTATIONS, lln, spreads

__all__ = ["DIAGS", "IMPLEMENTATIONS", "lln", "spreads"]
