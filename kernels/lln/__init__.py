"""Linear log-normal attention, with and without Diag."""

from kernels.lln.api import DIAGS, IMPLEMENTATIONS, diag_runs, lln, measure, spreads

__all__ = ["DIAGS", "IMPLEMENTATIONS", "diag_runs", "lln", "measure", "spreads"]
