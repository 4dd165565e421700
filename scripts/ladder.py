"""What accuracy on ListOps one reaches who understands how much of an expression.

python scripts/ladder.py                                                      # the ladder: predictors by depth
python scripts/ladder.py --cell results/runs/small/published/listops/lln/seed0 # a trained cell, by depth and length
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a clone that is not installed

from lra.listops_ladder import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
