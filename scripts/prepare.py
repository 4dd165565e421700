"""Prepare the data of tasks before a sweep: `python scripts/prepare.py task=listops,pathfinder`; `--help` says more."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a clone that is not installed

from lra.prepare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
