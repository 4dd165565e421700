"""From records to files: `leaderboard.csv`, `summary.csv`, `steps.csv`, and all three as Markdown and LaTeX.

All are byte-identical whatever the order of the records.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from omegaconf import OmegaConf

from lra import documents
from lra.errors import UserError
from lra.leaderboard import distinct, leaderboard, row_of
from lra.record import Cell, Record, read_records, write_text
from lra.steps import SECONDS, steps
from lra.summary import summary
from lra.terminal import print_cell, print_multirun

__all__ = ["Tables", "build", "print_cell", "print_multirun", "refresh", "row_of", "suites", "to_csv", "to_documents"]

SUITES = Path(__file__).parents[1] / "conf" / "suite"
SPEED_ONLY = "steps"
"""The budget whose accuracies mean nothing: it has rows in `steps.csv` alone."""

DECIMALS = {"steps_per_s": 3, "peak_mem_mib": 1, **dict.fromkeys(SECONDS, 1)}
DEFAULT_DECIMALS = 4


@dataclass(frozen=True)
class Tables:
    """The derived tables, what was found wrong on the way (one line each), and the files where they were written."""

    leaderboard: pd.DataFrame
    summary: pd.DataFrame
    steps: pd.DataFrame
    problems: list[str]
    records: list[Record] = field(default_factory=list, repr=False)  # what they are derived from, each cell once
    paths: list[Path] = field(default_factory=list)


def refresh(results_dir: str | Path) -> Tables:
    """Rebuild `leaderboard.csv`, `summary.csv` and `steps.csv` from all records of `results_dir`.

    A table of no rows is written all the same, but for `steps.csv`, which only cells alone on a GPU give rows.

    Safe when several processes call it at once: one at a time, each reading the records after it has the lock, so the
    last one sees everything. Write your own record first, then call this. UserError where nothing can be written.
    """
    results_dir = Path(results_dir)
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(results_dir / ".tables.lock"):
            return _write(build(*read_records(results_dir)), results_dir)
    except OSError as error:
        reason = f"cannot write the tables of {results_dir} ({error.strerror})"
        raise UserError(f"results_dir: {reason}; `python scripts/report.py {results_dir}` makes them") from error


def _write(tables: Tables, results_dir: Path) -> Tables:
    paths = []
    for name, table in (("leaderboard", tables.leaderboard), ("summary", tables.summary), ("steps", tables.steps)):
        if name != "steps" or len(table):
            paths.append(results_dir / f"{name}.csv")
            write_text(paths[-1], to_csv(table))
    return replace(tables, paths=paths)


def build(records: Iterable[Record], problems: Sequence[str] = ()) -> Tables:
    """All tables of sound records (see `read_records`) in any order; `problems` found before are passed on."""
    kept, doubled = distinct(records)
    rows = leaderboard(record for record in kept if Cell.of(record).budget != SPEED_ONLY)
    table, mixed = summary(rows, suites())
    return Tables(rows, table, steps(kept), [*problems, *doubled, *mixed], kept)


def to_csv(table: pd.DataFrame) -> str:
    """A table as CSV: missing cells empty, numbers rounded to what is worth printing."""
    decimals: dict[Any, int] = {
        column: DECIMALS.get(str(column), DEFAULT_DECIMALS) for column in table.select_dtypes("float64")
    }
    return table.round(decimals).to_csv(index=False, lineterminator="\n", na_rep="")


def to_documents(tables: Tables, results_dir: str | Path) -> list[Path]:
    """Write `tables.md` and `tables.tex`: the tables for a page and for a paper; their paths."""
    paths = [Path(results_dir, "tables.md"), Path(results_dir, "tables.tex")]
    for path, render in zip(paths, (documents.markdown, documents.latex), strict=True):
        write_text(path, render(tables.leaderboard, tables.summary, tables.steps))
    return paths


def suites(folder: str | Path = SUITES) -> dict[str, list[str]]:
    """Name to tasks of every `conf/suite/*.yaml`, by file name."""
    loaded: list[Any] = [OmegaConf.to_object(OmegaConf.load(path)) for path in sorted(Path(folder).glob("*.yaml"))]
    return {suite["name"]: suite["tasks"] for suite in loaded}
