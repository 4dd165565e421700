"""Rebuild the tables and curves from all records: `python scripts/report.py [results_dir]`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a clone that is not installed

from lra.efficiency import picture, table
from lra.report import refresh, to_documents


def main() -> int:
    parser = argparse.ArgumentParser(description="Rebuild the tables and curves from all records.")
    parser.add_argument("results_dir", nargs="?", default="results", type=Path, help="default: results")
    results_dir = parser.parse_args().results_dir
    if not results_dir.is_dir():
        parser.error(f"results_dir={results_dir} is no folder; name the one that holds runs/")
    tables = refresh(results_dir)
    for path in tables.paths:
        print(f"{path}: {len(getattr(tables, path.stem))} rows")
    for path in to_documents(tables, results_dir):
        print(path)
    problems = list(tables.problems)
    if (results_dir / table.FOLDER).is_dir():
        rows, found = table.refresh(results_dir)
        print(f"{results_dir / table.FILE}: {len(rows)} rows")
        for path in picture.draw(results_dir, rows):
            print(f"{path}.svg, .png")
        problems += found
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
