"""Efficiency records to `efficiency.csv`: ratios, bandwidth, slopes."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock

from lra.efficiency import baseline
from lra.efficiency.cases import TOKENS
from lra.efficiency.measure import KIND
from lra.record import SCHEMA, Record, write_json, write_text

FILE, FOLDER = "efficiency.csv", "efficiency"
"""The table, and where its records lie, below the results folder."""

KEY = ("attention", "length", "heads", "head_dim", "tokens", "dtype", "masked", "device")
"""What a row is."""

NUMBERS = (
    "fwd_ms", "fwd_bwd_ms", "peak_mem_mib", "fwd_ratio", "time_ratio", "memory_ratio", "bandwidth_fraction",
    "softmax_fwd_ms", "softmax_fwd_bwd_ms", "softmax_peak_mem_mib", "copy_gb_per_s", "check_error", "check_allowed",
)  # fmt: skip
COLUMNS = (*KEY, "batch", "settings", "impl", *NUMBERS, "timing", "softmax_backends", "status", "message", "code")

TOUCHES = 11
"""Passes over one (B, H, N, D) tensor that forward and backward of any attention need: q, k, v in and the output out;
q, k, v and the output's gradient in, three gradients out."""

SIGNIFICANT = "%.6g"
SHORTEST_CURVE = 3


def directory(results_dir: str | Path, device: str) -> Path:
    """Where the records and pictures of a device lie."""
    return Path(results_dir, FOLDER, re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"))


def store(results_dir: str | Path, record: Record) -> Path:
    """Write a record where its row belongs; an earlier one of the same row is replaced."""
    row = record["row"]
    shape = shape_name(row["heads"], row["head_dim"], row["tokens"], row["dtype"])
    name = f"n{row['length']}{'-masked' if row['masked'] else ''}.json"
    path = directory(results_dir, row["device"]) / shape / row["attention"] / name
    write_json(path, record)
    return path


def shape_name(heads: int, head_dim: int, tokens: int, dtype: str) -> str:
    """`h2-d32-bfloat16`; calls of another size than the shape's usual one say theirs, `h2-d32-t2048-bfloat16`."""
    size = "" if tokens == TOKENS.get((heads, head_dim)) else f"-t{tokens}"
    return f"h{heads}-d{head_dim}{size}-{dtype}"


def read(results_dir: str | Path) -> tuple[list[Record], list[str]]:
    """All sound records below the results folder, by path, and one line for each file that is none."""
    return read_sound(results_dir, f"{FOLDER}/**/n*.json", KIND, row_of)


def read_sound(
    results_dir: str | Path, pattern: str, kind: str, row: Callable[[Record], object]
) -> tuple[list[Record], list[str]]:
    """The records of a kind among the files of a pattern, by path, and one line for each file that gives no `row`."""
    records, problems = [], []
    for path in sorted(Path(results_dir).glob(pattern)):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if (record["schema"], record["kind"]) != (SCHEMA, kind):
                raise ValueError(f"is of another schema or kind than {SCHEMA}, {kind}")
            row(record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{path.relative_to(results_dir)}: cannot be used: {error!r}")
        else:
            records.append(record)
    return records, problems


def refresh(results_dir: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """Rebuild `efficiency.csv` from all records, safe when several processes do it at once; the table, and problems."""
    results_dir = Path(results_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(results_dir / ".tables.lock"):
        records, problems = read(results_dir)
        frame = table(records)
        write_text(results_dir / FILE, to_csv(frame))
    return frame, problems


def table(records: Iterable[Record]) -> pd.DataFrame:
    """One row a record, sorted by shape, mask, attention and length."""
    frame = pd.DataFrame([row_of(record) for record in records], columns=list(COLUMNS))
    frame = frame.astype(dict.fromkeys(NUMBERS, "float64"))
    by = ["device", "heads", "head_dim", "tokens", "dtype", "masked", "attention", "length"]
    return frame.sort_values(by=by, ignore_index=True)


def to_csv(frame: pd.DataFrame) -> str:
    """As CSV: six significant digits, missing cells empty."""
    return frame.to_csv(index=False, lineterminator="\n", na_rep="", float_format=SIGNIFICANT)


def row_of(record: Record) -> dict[str, Any]:
    """A record as a row. No number stands beside a failed check, and no ratio beside a baseline that is not sane."""
    row = record["row"]
    base, check = row.get("baseline") or {}, record.get("check") or {}
    measured = {name: row.get(name) for name in ("fwd_ms", "fwd_bwd_ms", "peak_mem_mib")}
    if not check.get("passed"):
        measured = dict.fromkeys(measured)
    ratios = {"fwd_ratio": "fwd_ms", "time_ratio": "fwd_bwd_ms", "memory_ratio": "peak_mem_mib"}
    trusted = not distrust(record)
    code = record.get("code") or {}
    return {
        **{name: row[name] for name in KEY},
        "batch": row["batch"],
        "settings": as_text(row["settings"]),
        "impl": row.get("impl"),
        **measured,
        **{name: _ratio(measured[key], base.get(key)) if trusted else None for name, key in ratios.items()},
        "bandwidth_fraction": _bandwidth_fraction(row, measured["fwd_bwd_ms"]),
        **{f"softmax_{name}": base.get(name) for name in measured},
        "copy_gb_per_s": row["copy_gb_per_s"],
        "check_error": check.get("error"),
        "check_allowed": check.get("allowed"),
        "timing": row.get("timing"),
        "softmax_backends": as_text({name: base[name] for name in ("forward", "training") if name in base}),
        "status": record["status"],
        "message": " ".join(part for part in (record.get("message"), distrust(record)) if part),
        "code": f"{(code.get('revision') or '')[:12]}{'-dirty' if code.get('dirty') else ''}",
    }


def distrust(record: Record) -> str:
    """Why no ratio of this record is to be had, or an empty string."""
    for length, anchor in (record.get("anchors") or {}).items():
        if not baseline.sane(anchor["measured_ms"], anchor["known_ms"]):
            return _slow(f"softmax at N={length}", anchor["measured_ms"], anchor["known_ms"])
    row = record["row"]
    known, measured = baseline.anchor_of(row), (row.get("baseline") or {}).get("fwd_bwd_ms")
    if known and measured and not baseline.sane(measured, known):
        return _slow("softmax", measured, known)
    return ""


def _slow(what: str, measured: float, known: float) -> str:
    return f"{what} took {measured:.3g} ms, known {known:.3g}: no ratios"


def as_text(settings: Mapping[str, Any]) -> str:
    """`rates=[2,8,32] gate=top1`: settings in one cell."""
    plain = (f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in settings.items())
    return " ".join(part.replace('"', "") for part in plain)


def slopes(frame: pd.DataFrame) -> pd.DataFrame:
    """log-log slope of time and memory of one sequence against its length: 1 is linear, 2 quadratic.

    One row for each curve of at least three lengths; columns `time_slope` and `memory_slope`.
    """
    keys = [key for key in KEY if key != "length"]
    rows = []
    for key, curve in frame.groupby(keys):
        assert isinstance(key, tuple)
        slope = {name: _slope(curve, column) for name, column in SLOPES.items()}
        rows.append({**dict(zip(keys, key, strict=True)), **slope})
    return pd.DataFrame(rows, columns=[*keys, *SLOPES])


SLOPES = {"time_slope": "fwd_bwd_ms", "memory_slope": "peak_mem_mib"}


def _slope(curve: pd.DataFrame, column: str) -> float:
    points: Any = curve[curve[column] > 0]
    return loglog_slope(points["length"], points[column] / points["batch"])


def loglog_slope(lengths: pd.Series, values: pd.Series) -> float:
    """Slope of ln value against ln length by least squares; NaN for fewer than three points."""
    if len(lengths) < SHORTEST_CURVE:
        return math.nan
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _bandwidth_fraction(row: Mapping[str, Any], ms: float | None) -> float | None:
    if not ms:
        return None
    size = {"bfloat16": 2, "float16": 2, "float32": 4}[row["dtype"]]
    touched = TOUCHES * row["batch"] * row["heads"] * row["length"] * row["head_dim"] * size
    return touched / (ms * 1e6) / row["copy_gb_per_s"]
