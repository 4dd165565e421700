"""Rebuild everything that is derived from records, or look at some of them.

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
from lra.errors import UserError
from lra.leaderboard import distinct
from lra.publish import publish
from lra.record import read_records

DESCRIPTION = """\
Rebuild everything that is derived from the records below RESULTS_DIR; the same bytes whatever their order.

  leaderboard.csv, summary.csv, steps.csv   accuracy, averages, training speed; also as tables.md, tables.tex
  efficiency.csv, lens.csv                  where scripts/efficiency.py or scripts/lens.py left records
  efficiency-NAME.csv                       of each paper's protocol that scripts/efficiency.py --protocol measured
  plots/*.svg, *.png                        accuracy against speed and memory, accuracy with intervals, learning curves,
                                            time and memory against length, approximation error against time; published
                                            numbers apart. Speeds count of cells that had the device for themselves
  report.html                               all of it in one file, with a card for each cell; needs no network"""


def main() -> int:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    made = publish(results_dir)
    for path, note in made.files:
        print(f"{path}: {note}" if note else path)
    for problem in made.problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
