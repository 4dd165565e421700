"""Everything that is derived from records: tables, documents, pictures and the page, for `scripts/report.py`.

All of it is the same bytes for the same records (and the same matplotlib), whatever their order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lra import report
from lra.efficiency import paper_table, picture
from lra.efficiency import table as efficiency
from lra.figures import accuracy, curves, error, protocols, published, tradeoff
from lra.figures.rows import FOLDER, Picture
from lra.lens import table as lens
from lra.page import page
from lra.record import write_text

PAGE = "report.html"


@dataclass(frozen=True)
class Published:
    """Every file written, with a note on what is in it, and what was found wrong on the way (one line each)."""

    files: list[tuple[Path, str]]
    problems: list[str]


def publish(results_dir: str | Path) -> Published:
    """Rebuild everything below `results_dir` that is derived. Without rows there is no picture, without a run no table.

    The folder of the pictures is the report's own: a picture that its records no longer give is removed.
    """
    results_dir = Path(results_dir)
    tables = report.refresh(results_dir)
    files = [(path, f"{len(getattr(tables, path.stem))} rows") for path in tables.paths]
    files += [(path, "") for path in report.to_documents(tables, results_dir)]
    measured, problems = measurements(results_dir)
    files += [(results_dir / f"{name}.csv", f"{len(rows)} rows") for name, rows in measured.items()]
    pictures = list(draw(results_dir, tables, measured))
    written = {made.path.with_suffix(suffix) for made in pictures for suffix in (".svg", ".png")}
    for path in (results_dir / FOLDER).glob("*.*"):
        if path.suffix in (".svg", ".png") and path not in written:
            path.unlink()
    files += [(path, "") for path in sorted(written)]
    write_text(results_dir / PAGE, page.render(tables, measured, pictures))
    files.append((results_dir / PAGE, "tables, plots and a card for each cell"))
    return Published(files, [*tables.problems, *problems])


def measurements(results_dir: Path) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The tables that are not of cells, rebuilt where there are records of their kind, by the name of their file."""
    found, problems = {}, []
    if (results_dir / efficiency.FOLDER).is_dir():
        found[Path(efficiency.FILE).stem], wrong = efficiency.refresh(results_dir)
        problems += wrong
    if (results_dir / paper_table.FOLDER).is_dir():
        protocols_of, wrong = paper_table.refresh(results_dir)
        found |= {path.stem: rows for path, rows in protocols_of.items()}
        problems += wrong
    if (results_dir / lens.FOLDER).is_dir():
        lens.refresh(results_dir)
        found["lens"] = lens.table(lens.read_lens_records(results_dir))
    return found, problems


def draw(results_dir: Path, tables: report.Tables, measured: Mapping[str, pd.DataFrame]) -> Iterator[Picture]:
    """The pictures that the tables give, the trade-off first; a trade-off plot is followed by its published twin."""
    ours = list(tradeoff.draw(results_dir, tables.leaderboard, tables.summary, tables.records))
    yield from ours
    if ours:
        yield published.draw_tradeoff(results_dir)
    yield from accuracy.draw(results_dir, tables.leaderboard)
    yield from curves.draw(results_dir, tables.leaderboard, tables.records)
    for name, rows in measured.items():
        if name == "lens":
            yield from error.draw(results_dir, rows)
        elif "protocol" in rows:
            yield from protocols.draw(results_dir, rows)
        elif ours := list(picture.draw(results_dir, rows)):
            yield from ours
            yield published.draw_lengths(results_dir)
