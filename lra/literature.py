"""What was published, beside ours: `published/map.csv` says which row of `published/lra-accuracy.csv` stands where."""

import csv
import io
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

PUBLISHED_BUDGET = "published"
"""The budget whose accuracies may be compared with published ones."""


@dataclass(frozen=True)
class Published:
    """A published accuracy in per cent, or None where a paper is known to give none; then `setting` says why."""

    accuracy: float | None
    source: str
    setting: str
    certainty: str


@dataclass(frozen=True)
class Measured:
    """A published speed, time or memory; `relative` to the same table's Transformer, speed as times faster.

    `place` is the length in tokens, or the task.
    """

    model: str
    metric: str
    place: str
    value: float | None
    relative: float | None
    hardware: str


@dataclass(frozen=True)
class Row:
    """A published row: a model, and its average accuracy over the tasks in per cent where there is one."""

    model: str
    average: float | None


def lookup(attention: str, task: str, protocol: str) -> Published | None:
    """What was published for a method under a protocol; None where the map names no row, for nothing compares."""
    return _mapped().get((attention, task, protocol))


def efficiency(table: str) -> list[Measured]:
    """The rows of one published table in `published/lra-efficiency.csv`, named in its first column."""
    relative = "relative_to_transformer(speed:x faster; memory:fraction)"
    return [
        Measured(row["model"], row["metric"], row["seq_len_or_task"], _number(row["value"]), _number(row[relative]),
                 row["hardware"])
        for row in _read("lra-efficiency.csv")
        if row["table"] == table
    ]  # fmt: skip


def accuracies(source: str) -> list[Row]:
    """The rows of `published/lra-accuracy.csv` whose source begins so."""
    return [Row(r["model"], _number(r["avg"])) for r in _read("lra-accuracy.csv") if r["source"].startswith(source)]


@cache
def _mapped() -> dict[tuple[str, str, str], Published]:
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in _read("lra-accuracy.csv"):
        rows.setdefault((row["model"], row["source"]), []).append(row)
    mapped = {}
    for entry in _read("map.csv"):
        key = entry["attention"], entry["task"], entry["protocol"]
        named = rows.get((entry["model"], entry["source"]), [])
        if len(named) != 1 or key in mapped:
            raise ValueError(f"published/map.csv: {' × '.join(key)} must name one row once, names {len(named)}")
        value, source = named[0][entry["task"]], f"{entry['model']} in {entry['source']}"
        mapped[key] = Published(_number(value), source, named[0]["setting"], named[0]["certainty"])
    return mapped


def _number(text: str) -> float | None:
    return float(text) if text not in ("", "FAIL") else None


def _read(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((files("lra") / "published" / name).read_text("utf-8"))))
