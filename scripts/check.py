"""Hold one attention to the contract and time it beside exact attention: `python scripts/check.py mine`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a clone that is not installed

from lra.contract import check
from lra.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description="Contract tests and efficiency of one attention.")
    parser.add_argument("attention", help="its registered name")
    try:
        return check(parser.parse_args().attention.removeprefix("attention="))
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
