"""Look through the lens: what attentions do with queries and keys, as `lens.csv` and a picture.

    python scripts/lens.py attention=lln,softmax task=listops                        # Gaussian q, k, v
    python scripts/lens.py attention=mra attention.blocks_per_row=2,4,8 task=listops # settings of one method
    python scripts/lens.py cell=results/runs/small/published/listops/lln/seed0       # a trained cell's layers

`python scripts/lens.py --help` lists the keys of its own; every key of `run.py` works as well.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lra.lens.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
