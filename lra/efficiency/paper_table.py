"""Records of the papers' efficiency protocols to `efficiency-<protocol>.csv`, one table a protocol, never mixed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from lra.efficiency import table
from lra.record import Record, overrides_hash, write_json, write_text

KIND = "efficiency-protocol"
FOLDER = "efficiency-protocols"
"""Where the records lie, below the results folder."""

KEY = ("protocol", "attention", "setting", "task", "length", "device", "precision")
"""What a row is; `setting` is what the protocol varies of an attention."""

STEP = ("steps_per_s", "speed_ratio", "peak_mem_mib", "memory_ratio", "hours")
"""Numbers of a training step; ratios are to softmax in the same run, of speed (larger is faster) and of memory."""

LAYER = (
    "ms_per_instance", "ms_std", "time_ratio", "mib_per_instance", "memory_ratio", "relative_error",
)  # fmt: skip
"""Numbers of one layer, forward and backward, over the batch; `relative_error` is that of the output to softmax's."""

NUMBERS = {"step": STEP, "layer": LAYER}


def store(results_dir: str | Path, record: Record) -> Path:
    """Write a record where its row belongs; an earlier one of the same row is replaced."""
    row = record["row"]
    device = table.directory("", row["device"]).name
    changed = f"+{overrides_hash(row['changed'])}" if row["changed"] else ""
    name = f"{row['task']}-{row['length']}-{row['precision']}.json"
    path = Path(results_dir, FOLDER, row["protocol"], device, f"{row['attention']}{changed}", name)
    write_json(path, record)
    return path


def read(results_dir: str | Path) -> tuple[list[Record], list[str]]:
    """All sound records below the results folder, by path, and one line for each file that is none."""
    return table.read_sound(results_dir, f"{FOLDER}/**/*.json", KIND, row_of)


def refresh(results_dir: str | Path) -> tuple[dict[Path, pd.DataFrame], list[str]]:
    """Rebuild the table of every protocol that has records; the tables by file, and problems."""
    results_dir = Path(results_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(results_dir / ".tables.lock"):
        records, problems = read(results_dir)
        tables = {}
        for protocol in sorted({record["row"]["protocol"] for record in records}):
            path = results_dir / f"efficiency-{protocol}.csv"
            tables[path] = build(record for record in records if record["row"]["protocol"] == protocol)
            write_text(path, table.to_csv(tables[path]))
    return tables, problems


def build(records: Iterable[Record]) -> pd.DataFrame:
    """The rows of one protocol, sorted by device, precision, case and attention."""
    rows = [row_of(record) for record in records]
    frame = pd.DataFrame(rows, columns=list(rows[0]) if rows else list(KEY))
    numbers = [column for column in frame if column in (*STEP, *LAYER)]
    by = ["device", "precision", "task", "length", "attention", "setting"]
    return frame.astype(dict.fromkeys(numbers, "float64")).sort_values(by=by, ignore_index=True)


def row_of(record: Record) -> dict[str, Any]:
    """A record as a row; a ratio only where softmax was measured in the same run."""
    row, base = record["row"], record["row"].get("baseline") or {}
    kind = row["kind"]
    speed, memory = ("steps_per_s", "peak_mem_mib") if kind == "step" else ("ms_per_instance", "mib_per_instance")
    ratios = {"speed_ratio": speed, "time_ratio": speed, "memory_ratio": memory}
    steps, rate = row.get("steps"), row.get("steps_per_s")
    values: dict[str, Any] = {name: _ratio(row.get(of), base.get(of)) for name, of in ratios.items()}
    values["hours"] = steps / rate / 3600 if steps and rate else None
    code = record.get("code") or {}
    return {
        **{name: row[name] for name in KEY if name != "setting"},
        "setting": table.as_text(row["changed"]),
        "batch": row.get("batch"),
        **{name: values[name] if name in values else row.get(name) for name in NUMBERS[kind]},
        "settings": table.as_text(row["settings"]),
        "impl": row.get("impl"),
        "timing": row.get("timing"),
        "status": record["status"],
        "message": record.get("message") or "",
        "code": f"{(code.get('revision') or '')[:12]}{'-dirty' if code.get('dirty') else ''}",
    }


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
