"""Rebuild the tables from all records: `python scripts/report.py [results_dir]`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a clone that is not installed

from lra.report import refresh


def main() -> int:
    parser = argparse.ArgumentParser(description="Rebuild leaderboard.csv and summary.csv from all records.")
    parser.add_argument("results_dir", nargs="?", default="results", type=Path, help="default: results")
    results_dir = parser.parse_args().results_dir
    if not results_dir.is_dir():
        parser.error(f"results_dir={results_dir} is no folder; name the one that holds runs/")
    tables = refresh(results_dir)
    for path, table in zip(tables.paths, (tables.leaderboard, tables.summary), strict=True):
        print(f"{path}: {len(table)} rows")
    for problem in tables.problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
