"""Everything that is derived from records: tables, documents, pictures and the page, for `scripts/report.py`.

All of it is the same bytes for the same records (and the same matplotlib), whatever their order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lra import report
from lra.efficiency import paper_table, picture
from lra.efficiency import table as efficiency
from lra.figures import accuracy, curves, error, published, tradeoff
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
    problems = list(tables.problems)
    speed = looked = None
    if (results_dir / efficiency.FOLDER).is_dir():
        speed, found = efficiency.refresh(results_dir)
        files.append((results_dir / efficiency.FILE, f"{len(speed)} rows"))
        problems += found
    if (results_dir / paper_table.FOLDER).is_dir():
        protocols, found = paper_table.refresh(results_dir)
        files += [(path, f"{len(rows)} rows") for path, rows in protocols.items()]
        problems += found
    if (results_dir / lens.FOLDER).is_dir():
        files.append((lens.refresh(results_dir), ""))
        looked = lens.table(lens.read_lens_records(results_dir))
    pictures = list(draw(results_dir, tables, speed, looked))
    written = {made.path.with_suffix(suffix) for made in pictures for suffix in (".svg", ".png")}
    for path in (results_dir / FOLDER).glob("*.*"):
        if path.suffix in (".svg", ".png") and path not in written:
            path.unlink()
    files += [(path, "") for path in sorted(written)]
    write_text(results_dir / PAGE, page.render(tables, speed, pictures))
    return Published([*files, (results_dir / PAGE, "tables, plots and a card for each cell")], problems)


def draw(
    results_dir: Path, tables: report.Tables, speed: pd.DataFrame | None = None, looked: pd.DataFrame | None = None
) -> Iterator[Picture]:
    """The pictures that the tables give, the trade-off first; a trade-off plot is followed by its published twin."""
    ours = list(tradeoff.draw(results_dir, tables.leaderboard, tables.summary, tables.records))
    yield from ours
    if ours:
        yield published.draw_tradeoff(results_dir)
    yield from accuracy.draw(results_dir, tables.leaderboard)
    yield from curves.draw(results_dir, tables.leaderboard, tables.records)
    if speed is not None and (ours := list(picture.draw(results_dir, speed))):
        yield from ours
        yield published.draw_lengths(results_dir)
    if looked is not None:
        yield from error.draw(results_dir, looked)
