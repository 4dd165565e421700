"""Linear log-normal attention, with and without Diag."""

from kernels.lln.api import DIAGS, lln, spreads

__all__ = ["DIAGS", "lln", "spreads"]
