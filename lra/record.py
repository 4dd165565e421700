"""One cell, one `record.json`: the cell's identity and directory, the atomic write, the tolerant read."""

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

SCHEMA = 1
KIND = "cell"
FILENAME = "record.json"
STATUSES = ("ok", "oom", "nan", "timeout", "error", "preempted", "interrupted")

Record = dict[str, Any]
"""What `record.json` holds; `problem_with` says which parts the tables rely on."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Cell:
    """An (attention, task, protocol, budget, seed) combination and the overrides that change its numbers.

    `overrides` maps dotted keys to plain JSON values; keys of output, logging or workers do not belong there.
    ValueError where a name cannot be a folder, the seed is no natural number, or an override is no JSON value.
    """

    attention: str
    task: str
    protocol: str
    budget: str
    seed: int
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for key in ("attention", "task", "protocol", "budget"):
            name = getattr(self, key)
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f"{key}={name!r} cannot name a folder; allowed: letters, digits and _ . -")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} is not allowed; a seed is an integer >= 0")
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides={self.overrides!r} is not allowed; a mapping of dotted keys to values is")
        for key, value in self.overrides.items():
            if not isinstance(key, str) or not _survives_json(value):
                raise ValueError(
                    f"override {key}={value!r} is not a JSON value; allowed: null, bool, number, string, list"
                )

    @property
    def name(self) -> str:
        """The attention, and behind a plus the hash of the overrides if there are any: `mra+1f0c9e2b`."""
        return f"{self.attention}+{overrides_hash(self.overrides)}" if self.overrides else self.attention

    @property
    def label(self) -> str:
        """For a line of a log or the name of a run: `mra+1f0c9e2b listops small published seed0`."""
        return f"{self.name} {self.task} {self.protocol} {self.budget} seed{self.seed}"

    def directory(self, results_dir: str | Path) -> Path:
        """Where everything of this cell lies; a function of the cell alone, so that it can resume and be skipped."""
        return Path(results_dir, "runs", self.protocol, self.budget, self.task, self.name, f"seed{self.seed}")

    def to_dict(self, *, starred: bool = False) -> dict[str, Any]:
        """The record's `cell` entry; `starred` says that a key which the protocol owns was overridden."""
        identity = {key: getattr(self, key) for key in ("attention", "task", "protocol", "budget", "seed")}
        return {**identity, "overrides": dict(self.overrides), "starred": starred}

    @classmethod
    def of(cls, record: Record) -> "Cell":
        """The cell that wrote a record. KeyError, TypeError or ValueError where there is no such cell."""
        entry = record["cell"]
        return cls(*(entry[key] for key in ("attention", "task", "protocol", "budget", "seed", "overrides")))


def lock_of(directory: Path) -> Path:
    """The file that the process which trains the cell of a directory holds locked."""
    return directory.with_name(f"{directory.name}.lock")


def is_held(directory: Path) -> bool:
    """Whether a process trains the cell of a directory now. Looking holds the lock for a moment itself."""
    lock = lock_of(directory)
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a file system, or a user, without locks
        return False


def canonical_json(data: Any) -> str:
    """The one way to write `data` as JSON: sorted keys, no spaces; ValueError for NaN and infinities."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def overrides_hash(overrides: Mapping[str, Any]) -> str:
    """8 hexadecimal digits of the SHA-256 over the canonical JSON; independent of the order of the keys."""
    return hashlib.sha256(canonical_json(dict(overrides)).encode()).hexdigest()[:8]


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of a text as UTF-8, its line ends as they are."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file that is always whole: temporary file beside it, fsync, rename. Makes the folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, data: Any) -> None:
    """`write_text` of `data` as JSON. JSON knows no NaN: numbers that are not finite are written as null."""
    write_text(path, json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _survives_json(value: Any) -> bool:
    try:
        return json.loads(canonical_json(value)) == value
    except (TypeError, ValueError):
        return False


def read_records(results_dir: str | Path) -> tuple[list[Record], list[str]]:
    """All sound records below `results_dir/runs`, by path, and one line for each file that is none.

    Never raises for what a file holds: a half-written record, one of an unknown schema or one that lies in another
    cell's directory (a copy would count a seed twice) becomes a line, and the tables go on without it.
    """
    records, problems = [], []
    for path in sorted(Path(results_dir, "runs").rglob(FILENAME)):
        where = path.relative_to(results_dir)
        record, problem = _read(path)
        if problem is None and (home := Cell.of(record).directory("")) != where.parent:
            problem = f"belongs to {home}, is left out here"
        if problem is None:
            records.append(record)
        else:
            problems.append(f"{where}: {problem}")
    return records, problems


def read_record(path: str | Path) -> Record | None:
    """The record in a file, or None where there is none that is sound."""
    record, problem = _read(Path(path))
    return record if problem is None else None


def problem_with(record: Any) -> str | None:
    """Why the tables cannot use `record`, in one line, or None. A failed cell may lack what it had no time to find."""
    if not isinstance(record, dict):
        return "is no JSON object"
    if type(record.get("schema")) is not int or record["schema"] != SCHEMA:
        return f"schema={record.get('schema')!r} is unknown; this version reads {SCHEMA}"
    if record.get("kind") != KIND:
        return f"kind={record.get('kind')!r} is unknown; known: {KIND}"
    if record.get("status") not in STATUSES:
        return f"status={record.get('status')!r} is unknown; known: {', '.join(STATUSES)}"
    try:
        Cell.of(record)
    except (KeyError, TypeError, ValueError) as error:
        return f"cell is incomplete or wrong: {error}"
    if not isinstance(record["cell"].get("starred", False), bool):
        return f"cell.starred={record['cell']['starred']!r} is neither true nor false"
    for section, fields in _FIELDS.items():
        entry = record if section == "" else record.get(section)
        if not isinstance(entry, dict | None):
            return f"{section}={entry!r} is no JSON object"
        for key, (kind, allowed) in fields.items():
            value = (entry or {}).get(key)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                return f"{section}{'.' if section else ''}{key}={value!r} is not {allowed}"
    counts = record.get("test") or {}
    for which in ("best", "last"):
        if counts.get(which) is not None and not _is_count(counts[which]):
            return f"test.{which}={counts[which]!r} has no 0 <= correct <= total with total >= 1"
    if record["status"] == "ok" and not (counts.get("best") and digest_of(record) and device_of(record)):
        return "status=ok needs test.best, data.digest and device.name"
    return None


def digest_of(record: Record) -> str:
    """The digest of the cell's data; empty where the cell failed before it knew."""
    return (record.get("data") or {}).get("digest") or ""


def device_of(record: Record) -> str:
    """The device as the tables name it, `2 x NVIDIA H100` for two; empty where the cell failed before it knew."""
    device = record.get("device") or {}
    name, count = device.get("name") or "", device.get("count") or 1
    return f"{count} x {name}" if name and count > 1 else name


_TEXT, _INTEGER, _NUMBER, _OBJECT = (str, "text"), (int, "an integer"), (int | float, "a number"), (dict, "an object")
_FIELDS: dict[str, dict[str, tuple[Any, str]]] = {
    "": {
        "message": _TEXT,
        "finished": _TEXT,
        "selection": _TEXT,
        "impl": _TEXT,
        "precision": _TEXT,
        "parameters": _INTEGER,
        "processes": _INTEGER,
        "class_prior": _NUMBER,
        "steps_per_s": _NUMBER,
        "peak_mem_mib": _NUMBER,
    },
    "data": {"digest": _TEXT},
    "device": {"name": _TEXT, "count": _INTEGER, "sharing": _INTEGER},
    "code": {"revision": _TEXT},
    "test": {"best": _OBJECT, "last": _OBJECT},
}
"""What the tables read beyond identity and status, and its types; any of it may be absent or null."""


def _read(path: Path) -> tuple[Any, str | None]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        return None, f"cannot be read: {error}"
    return record, problem_with(record)


def _is_count(entry: dict[str, Any]) -> bool:
    correct, total = entry.get("correct"), entry.get("total")
    return type(correct) is int and type(total) is int and 0 <= correct <= total and total >= 1


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
