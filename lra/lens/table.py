"""Lens records to `lens.csv`."""

import json
from pathlib import Path

import pandas as pd
from filelock import FileLock

from lra.lens.measurement import INSTRUMENTS
from lra.record import FILENAME, SCHEMA, Record, write_text

KIND = "lens"
FOLDER = "lens"
"""Where records of this kind lie below the results folder."""

IDENTITY = ("attention", "setting", "task", "protocol", "source", "layer", "scale", "length")
"""What a row is: its other columns are what was measured, and on what."""

COLUMNS = (*IDENTITY, "heads", "head_dim", "sequences", "seed", "device", "dtype", "impl", "ms", *INSTRUMENTS)
"""The columns of every row; the methods' own diagnostics follow, by name."""

SIGNIFICANT = "%.6g"


def refresh(results_dir: Path) -> Path:
    """Rebuild `lens.csv` from all lens records, safe when several processes finish at once; returns its path."""
    path = results_dir / "lens.csv"
    results_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(results_dir / ".lens.lock"):
        write_text(path, to_csv(table(read_lens_records(results_dir))))
    return path


def read_lens_records(results_dir: Path) -> list[Record]:
    """All sound lens records below the results folder, by path; what cannot be read is left out."""
    records = []
    for path in sorted((results_dir / FOLDER).rglob(FILENAME)):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and (record.get("schema"), record.get("kind")) == (SCHEMA, KIND):
            records.append(record)
    return records


def table(records: list[Record]) -> pd.DataFrame:
    """One row a measurement: the common part of its record, then what was measured; sorted by identity."""
    rows = [{**record["common"], **row} for record in records for row in record["rows"]]
    extra = sorted({key for row in rows for key in row} - set(COLUMNS))
    frame = pd.DataFrame(rows, columns=[*COLUMNS, *extra])
    return frame.sort_values(by=list(IDENTITY), ignore_index=True, na_position="first")


def to_csv(frame: pd.DataFrame) -> str:
    """As CSV: six significant digits, missing cells empty."""
    return frame.to_csv(index=False, lineterminator="\n", na_rep="", float_format=SIGNIFICANT)
