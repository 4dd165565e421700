"""Audit a task's images: shortcuts that must not work, and a small CNN that must.

    python scripts/audit.py                                              # Pathfinder, hard; a GPU trains the CNN
    python scripts/audit.py task.contour_length=6 control.epochs=0       # another level, without the CNN

`python scripts/audit.py --help` says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lra.audit.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
