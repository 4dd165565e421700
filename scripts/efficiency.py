"""Measure attentions beside exact attention: records, `efficiency.csv` and curves.

    python scripts/efficiency.py                                       # everything: a few minutes on a GPU
    python scripts/efficiency.py --only lln,adamra --lengths 1024,4096
    python scripts/efficiency.py --device cpu --tokens 2048 --lengths 256,512,1024
    python scripts/efficiency.py --protocol lra                        # as a paper measured: lra, skyformer, mra

`python scripts/efficiency.py --help` lists the options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lra.efficiency import command, paper_run

if __name__ == "__main__":
    asked = sys.argv[1:]
    of_a_paper = any(argument.startswith("--protocol") for argument in asked)
    sys.exit(paper_run.main(asked) if of_a_paper else command.main(asked))
