"""Sweeps on a cluster: submit and leave.

    python scripts/sweep.py submit attention=softmax,mra task=listops seed=0,1,2          # one array, then returns
    python scripts/sweep.py submit --plan attention=softmax,mra task=listops seed=0,1,2   # shows it, submits nothing
    python scripts/sweep.py status                                                        # every cell of the latest
    python scripts/sweep.py collect                                                       # tables from what is there
    python scripts/sweep.py retry --oom halve                                             # again what failed

`conf/hydra/launcher/slurm.yaml` holds partition, time, memory and the like.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a clone that is not installed

if __name__ == "__main__":
    try:
        from lra.sweep.command import main
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        sys.exit("scripts/sweep.py needs submitit; pip install -e '.[cluster]'")
    sys.exit(main(sys.argv[1:], runpy.run_path(str(ROOT / "run.py"), run_name="run")["main"]))
