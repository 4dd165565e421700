"""The speed of training on this machine's GPUs: `steps.csv`, a few hundred steps of every attention on every shape.

    python scripts/steps.py                                      # everything, into results
    python scripts/steps.py attention=none,lln task=listops results_dir=results/mine

Two grids of `run.py -m budget=steps`: the first only compiles, several cells at a time; in the second every cell has a
GPU for itself. What is finished in the second is not repeated, as in any grid. Arguments are those of `run.py`.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

RUN = Path(__file__).parents[1] / "run.py"

DEFAULTS = {
    "attention": "none,lln,adamra,combiner,mra,routing,softmax",
    "task": "listops,text,retrieval,image,pathfinder",
    "results_dir": "results",
    "data.root": "results/data",
}

MISTAKE = 2
"""Exit code of `run.py`, and of this script, for a command that is refused in one line."""

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
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if unread := [argument for argument in arguments if "=" not in argument]:
        print(f"{unread[0]} is not key=value; --help shows the commands", file=sys.stderr)
        return MISTAKE
    if not torch.cuda.is_available():
        print("scripts/steps.py times cells on a GPU; this machine shows no CUDA device", file=sys.stderr)
        return MISTAKE
    with tempfile.TemporaryDirectory() as scratch:
        compiling, measuring = grids(arguments, scratch)
        if subprocess.call(compiling) == MISTAKE:  # what else fails there fails again below, and is recorded
            return MISTAKE
    return subprocess.call(measuring)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
