"""The leaderboard: one row an (attention, task, protocol, budget, data digest, device), from records."""

import json
from collections.abc import Iterable
from typing import Any

import pandas as pd

from lra import literature, stats
from lra.record import Cell, Record, canonical_json, device_of, digest_of

ROW = ("attention", "task", "protocol", "budget", "data_digest", "device")
"""What a row never mixes. `attention` carries the hash of the overrides, and a * where the row is starred."""

COLUMNS = {
    **dict.fromkeys(ROW, "object"),
    "n_seeds": "int64",  # finished ones; their accuracies are of the best checkpoint on the whole test set, in per cent
    "accuracy_mean": "float64",
    "accuracy_std": "float64",
    "seed_ci95_low": "float64",  # Student's t over seeds; empty for one seed
    "seed_ci95_high": "float64",
    "test_ci95_low": "float64",  # Wilson, for the size of the test set
    "test_ci95_high": "float64",
    "failures": "int64",  # cells whose status is not ok; the next column counts how they ended
    "failure_kinds": "object",
    "chance_seeds": "Int64",  # finished seeds whose own interval does not lie above the class prior
    "class_prior": "float64",
    "selected_on": "object",  # the split that chose the best checkpoint
    "published": "float64",
    "published_source": "object",
    "published_setting": "object",
    "published_certainty": "object",
    "gap": "float64",  # accuracy_mean - published, in points; empty for a starred row and for any other budget
    "parameters": "object",
    # Mean over the seeds that shared the device with fewest; empty, as the memory is, where impl or precision differ.
    "steps_per_s": "float64",
    "peak_mem_mib": "float64",  # largest of the seeds
    "last_accuracy_mean": "float64",  # of the last step instead of the best checkpoint
    "last_accuracy_std": "float64",
    "seeds": "object",
    "impl": "object",
    "precision": "object",
    "overrides": "object",
    "code": "object",
}
"""Columns and their types. Where seeds of a row disagree in a column of text, it shows all values, joined by |."""


def leaderboard(records: Iterable[Record]) -> pd.DataFrame:
    """The table of sound, `distinct` records. Failed cells count in their row, or have one of their own.

    Sorted by protocol, budget, task, device and data, the most accurate first.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for key, record in _placed(records):
        groups.setdefault(key, []).append(record)
    rows = [_row(key, sorted(group, key=lambda record: record["cell"]["seed"])) for key, group in groups.items()]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    keys = ["protocol", "budget", "task", "device", "data_digest", "accuracy_mean", "attention"]
    return table.sort_values(by=keys, ascending=[key != "accuracy_mean" for key in keys], ignore_index=True)


def distinct(records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    """Each seed of each row once: of several records the last finished, and a line where they differ."""
    chosen: dict[tuple[Any, ...], Record] = {}
    problems = set()
    for record in sorted(records, key=_by_finish):
        key = (*row_key(record), record["cell"]["seed"])
        if chosen.setdefault(key, record) != record:
            problems.add(f"{Cell.of(record).label}: several records of this cell differ; the last finished counts")
        chosen[key] = record
    return list(chosen.values()), sorted(problems)


def row_key(record: Record) -> tuple[str, ...]:
    """The values of `ROW` for a record; digest and device are empty where the cell failed before it knew them."""
    cell, star = Cell.of(record), "*" if record["cell"].get("starred") else ""
    return cell.name + star, cell.task, cell.protocol, cell.budget, digest_of(record), device_of(record)


def row_of(table: pd.DataFrame, record: Record) -> dict[str, Any] | None:
    """The row of the leaderboard that counts a finished record, or None."""
    rows: Any = table[(table[list(ROW)] == list(row_key(record))).all(axis=1)]
    return None if rows.empty else rows.iloc[0].to_dict()


def _placed(records: Iterable[Record]) -> list[tuple[tuple[str, ...], Record]]:
    """Records with their row. One that failed before it knew data or device goes to the only row it can belong to."""
    keyed = [(row_key(record), record) for record in records]
    known = {key for key, _ in keyed if all(key)}

    def place(key: tuple[str, ...]) -> tuple[str, ...]:
        fitting = [row for row in known if all(own in ("", theirs) for own, theirs in zip(key, row, strict=True))]
        return fitting[0] if len(fitting) == 1 else key

    return [(place(key), record) for key, record in keyed]


def _row(key: tuple[str, ...], records: list[Record]) -> dict[str, Any]:
    cell = Cell.of(records[0])
    ok = [record for record in records if record["status"] == "ok"]
    failed = sorted(record["status"] for record in records if record["status"] != "ok")
    accuracies = _accuracies(ok)
    return {
        **dict(zip(ROW, key, strict=True)),
        "n_seeds": len(ok),
        **accuracies,
        "failures": len(failed),
        "failure_kinds": " ".join(f"{kind}:{failed.count(kind)}" for kind in dict.fromkeys(failed)),
        **_chance(ok),
        "selected_on": _values(ok, "selection"),
        **_published(cell, accuracies["accuracy_mean"], starred=key[0].endswith("*")),
        "parameters": _values(ok, "parameters"),
        **_costs(ok),
        "seeds": " ".join(str(record["cell"]["seed"]) for record in ok),
        "impl": _values(ok, "impl"),
        "precision": _values(ok, "precision"),
        "overrides": canonical_json(dict(cell.overrides)) if cell.overrides else "",
        "code": _joined(_revision(record) for record in ok),
    }


def _accuracies(ok: list[Record]) -> dict[str, float | None]:
    counts = [_count(record, "best") for record in ok]
    best = [stats.accuracy(*count) for count in counts]
    last = [stats.accuracy(*_count(record, "last")) for record in ok if record["test"].get("last")]
    seed_low, seed_high = stats.seed_interval(best) or (None, None)
    test_low, test_high = stats.item_interval(counts) or (None, None)
    return {
        "accuracy_mean": stats.mean(best),
        "accuracy_std": stats.sample_std(best),
        "seed_ci95_low": seed_low,
        "seed_ci95_high": seed_high,
        "test_ci95_low": test_low,
        "test_ci95_high": test_high,
        "last_accuracy_mean": stats.mean(last),
        "last_accuracy_std": stats.sample_std(last),
    }


def _chance(ok: list[Record]) -> dict[str, float]:
    judged = [record for record in ok if record.get("class_prior") is not None]
    if not judged:
        return {}
    stuck = sum(stats.at_chance(_count(record, "best"), record["class_prior"]) for record in judged)
    return {"chance_seeds": stuck, "class_prior": 100 * max(record["class_prior"] for record in judged)}


def _published(cell: Cell, ours: float | None, *, starred: bool) -> dict[str, Any]:
    known = literature.lookup(cell.attention, cell.task, cell.protocol)
    if known is None:
        return {}
    changed = starred or any(key.startswith("attention.") for key in cell.overrides)
    compares = cell.budget == literature.PUBLISHED_BUDGET and not changed
    gap = ours - known.accuracy if compares and ours is not None and known.accuracy is not None else None
    return {
        "published": known.accuracy,
        "published_source": known.source,
        "published_setting": known.setting,
        "published_certainty": known.certainty,
        "gap": gap,
    }


def _costs(ok: list[Record]) -> dict[str, float | None]:
    """Speed and memory belong to one way of computing: none where the seeds of a row were computed in two."""
    if len({(record.get("impl"), record.get("precision")) for record in ok}) > 1:
        return {}
    least = min((_sharing(record) for record in ok), default=1)
    alone = [record for record in ok if _sharing(record) == least]
    speeds = [record["steps_per_s"] for record in alone if record.get("steps_per_s") is not None]
    peaks = [record["peak_mem_mib"] for record in ok if record.get("peak_mem_mib") is not None]
    return {"steps_per_s": stats.mean(speeds), "peak_mem_mib": max(peaks, default=None)}


def _sharing(record: Record) -> int:
    """How many cells shared the device; records of earlier versions do not say."""
    return record["device"].get("sharing") or 1


def _count(record: Record, which: str) -> stats.Count:
    return record["test"][which]["correct"], record["test"][which]["total"]


def _values(records: list[Record], key: str) -> str:
    return _joined(str(record[key]) for record in records if record.get(key) is not None)


def _joined(values: Iterable[str]) -> str:
    return "|".join(sorted(set(values) - {""}))


def _revision(record: Record) -> str:
    code = record.get("code") or {}
    return f"{(code.get('revision') or '')[:12]}{'-dirty' if code.get('dirty') else ''}"


def _by_finish(record: Record) -> tuple[str, str]:
    return record.get("finished") or "", json.dumps(record, sort_keys=True)
