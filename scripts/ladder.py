"""What accuracy on ListOps one reaches who understands how much of an expression: `python scripts/ladder.py`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a clone that is not installed

from lra import stats, tasks
from lra.tasks import Split
from lra.tasks.listops.ladder import climb


def main() -> int:
    parser = argparse.ArgumentParser(description="The ladder of ListOps: accuracy by structure understood.")
    parser.add_argument("data_root", nargs="?", default="results/data", type=Path, help="default: results/data")
    data = tasks.build("listops").prepare(parser.parse_args().data_root)
    train = Split(*(array[:20_000] for array in data.splits["train"]))
    print(f"ListOps {data.digest[:12]}, {data.counts['test']:,} test items; a predictor that knows …")
    for rung in climb(train, data.splits["test"]):
        low, high = stats.wilson_interval(rung.correct, rung.total)
        print(f"{100 * rung.accuracy:6.1f} %  ({low:.1f} to {high:.1f})  {rung.knows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
