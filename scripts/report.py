"""Rebuild the tables and curves from all records, or look at some of them.

python scripts/report.py [results_dir]
python scripts/report.py --with results/reference/h100               # your rows beside those, which do not run again
python scripts/report.py --compare adamra,softmax --task listops     # two rows on the same test items: McNemar
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a clone that is not installed

from lra.beside import beside
from lra.comparison import compare
from lra.efficiency import picture, table
from lra.errors import UserError
from lra.leaderboard import distinct
from lra.record import read_records
from lra.report import refresh, to_documents


def main() -> int:
    parser = argparse.ArgumentParser(description="Rebuild the tables and curves from all records.")
    parser.add_argument("results_dir", nargs="?", default="results", type=Path, help="default: results")
    parser.add_argument("--compare", type=_two, metavar="A,B", help="two rows on the same test items, rebuild nothing")
    parser.add_argument("--with", type=Path, dest="other", metavar="DIR", help="your rows beside those of DIR")
    parser.add_argument("--task", default="", help="of --compare; default: every task that both have")
    request = parser.parse_args()
    if not request.results_dir.is_dir():
        parser.error(f"results_dir={request.results_dir} is no folder; name the one that holds runs/")
    try:
        if request.compare:
            return show_comparisons(request.results_dir, *request.compare, request.task)
        return show_beside(request.results_dir, request.other) if request.other else rebuild(request.results_dir)
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return 2


def _two(text: str) -> list[str]:
    names = text.split(",")
    if len(set(names)) != 2 or len(names) != 2 or not all(names):
        raise argparse.ArgumentTypeError(f"{text} is not possible; name two rows: adamra,softmax")
    return names


def show_comparisons(results_dir: Path, first: str, second: str, task: str) -> int:
    records, _ = distinct(read_records(results_dir)[0])
    print("\n\n".join(map(str, compare(results_dir, records, first, second, task))))
    return 0


def show_beside(results_dir: Path, other_dir: Path) -> int:
    paths, refused = beside(results_dir, other_dir)
    print("\n".join(path.read_text() for path in paths if path.suffix == ".md"))
    print("\n".join(map(str, paths)))
    for line in refused:
        print(line, file=sys.stderr)
    return 0


def rebuild(results_dir: Path) -> int:
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
