"""Train one cell of the benchmark, or with -m a grid of them.

python run.py attention=adamra task=listops
python run.py -m attention=softmax,adamra task=listops seed=0,1,2
python run.py attention=adamra task=listops --cfg job     # what would run
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent
os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # lra.cli makes one line of every mistake
sys.path.append(str(ROOT / "lra" / "plugins"))  # where Hydra finds our launcher

import hydra
from omegaconf import DictConfig

from lra import cli


@hydra.main(version_base="1.3", config_path=str(ROOT.resolve() / "conf"), config_name="config")
def main(composed: DictConfig) -> None:
    cli.run_one(composed)


if __name__ == "__main__":
    sys.exit(cli.guard(main))
