"""Published accuracies beside ours: `published/map.csv` says which row of `published/lra-accuracy.csv` stands where."""

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


def lookup(attention: str, task: str, protocol: str) -> Published | None:
    """What was published for a method under a protocol; None where the map names no row, for nothing compares."""
    return _mapped().get((attention, task, protocol))


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
        accuracy = float(value) if value not in ("", "FAIL") else None
        mapped[key] = Published(accuracy, source, named[0]["setting"], named[0]["certainty"])
    return mapped


def _read(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((files("lra") / "published" / name).read_text("utf-8"))))
