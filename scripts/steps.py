"""The speed of training on this machine's GPUs: `steps.csv`, a few hundred steps of every attention on every shape.

    python scripts/steps.py                                      # everything, into results/reference/h100
    python scripts/steps.py attention=none,lln task=listops results_dir=results/mine

Two grids of `run.py -m budget=steps`: the first only compiles, several cells at a time; in the second every cell has a
GPU for itself. What is finished in the second is not repeated, as in any grid. Arguments are those of `run.py`.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

RUN = Path(__file__).parents[1] / "run.py"

DEFAULTS = {
    "attention": "none,lln,adamra,combiner,mra,routing,softmax",
    "task": "listops,text,retrieval,image,pathfinder",
    "results_dir": "results/reference/h100",
    "data.root": "results/data",
}

AT_A_TIME = 7
"""Cells that compile on one GPU; they need its processors more than it."""


def grids(arguments: Sequence[str], scratch: str) -> tuple[list[str], list[str]]:
    """The command that compiles, into a folder of its own, and the command that measures."""
    chosen = DEFAULTS | dict(argument.split("=", 1) for argument in arguments)
    command = [sys.executable, str(RUN), "-m", "budget=steps", "logger=none"]
    measure = [*command, *(f"{key}={value}" for key, value in chosen.items())]
    chosen |= {"results_dir": scratch, "training.steps": "61", "training.validate_every": "61"}
    chosen |= {"hydra.launcher.per_gpu": str(AT_A_TIME)}
    return [*command, *(f"{key}={value}" for key, value in chosen.items())], measure


def main(arguments: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        compiling, measuring = grids(arguments, scratch)
        subprocess.call(compiling)  # what fails there fails again below, and is recorded
    return subprocess.call(measuring)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
