"""Sweeps on a cluster: packs of cells as one SLURM array, looked after from any shell; see `scripts/sweep.py`."""
