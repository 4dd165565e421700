"""What a sweep consists of, on disk: any shell that sees `results_dir` can look after it.

<results_dir>/sweeps/<name>/sweep.json       the cells, in which pack each runs, and the job of each pack
<results_dir>/sweeps/<name>/pack<k>.json     where a pack is, written by its job
<results_dir>/sweeps/<name>/jobs/            submitit's scripts, and what the jobs print
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lra.errors import UserError
from lra.launcher import Job
from lra.record import Cell, write_json

FILE = "sweep.json"


@dataclass
class Entry:
    """A cell of a sweep: who it is, the command that trains it, the pack that does, and whether another replaced it."""

    identity: dict[str, Any]
    overrides: list[str]
    pack: int | None = None  # None: it was not submitted, for it had finished before
    replaced: bool = False

    @property
    def cell(self) -> Cell:
        return Cell.of({"cell": self.identity})

    @classmethod
    def of(cls, job: Job, pack: int | None) -> "Entry":
        return cls(job.cell.to_dict(starred=job.starred), job.overrides, pack)


@dataclass
class Sweep:
    """A sweep: `jobs[k]` is the id of the job of pack k, empty while it is being submitted."""

    name: str
    results_dir: Path
    created: str
    code: dict[str, Any]
    settings: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return folder_of(self.results_dir, self.name)

    @property
    def current(self) -> list[Entry]:
        """The cells that count: not those which another one replaced."""
        return [entry for entry in self.entries if not entry.replaced]

    def write(self) -> None:
        plain = {key: value for key, value in asdict(self).items() if key != "results_dir"}
        write_json(self.folder / FILE, plain)


def folder_of(results_dir: Path, name: str) -> Path:
    return results_dir / "sweeps" / name


def read(results_dir: Path, name: str | None) -> Sweep:
    """The sweep of that name, or the latest; UserError where there is none."""
    if name is None:
        known = [read(results_dir, path.parent.name) for path in (results_dir / "sweeps").glob(f"*/{FILE}")]
        if not known:
            raise UserError(f"results_dir={results_dir} has no sweep; `python scripts/sweep.py submit` makes one")
        return max(known, key=lambda sweep: sweep.created)
    path = folder_of(results_dir, name) / FILE
    try:
        plain = json.loads(path.read_text())
        entries = [Entry(**entry) for entry in plain.pop("entries")]
        return Sweep(results_dir=results_dir, entries=entries, **plain)
    except FileNotFoundError:
        known = sorted(path.parent.name for path in (results_dir / "sweeps").glob(f"*/{FILE}"))
        raise UserError(f"{name} is no sweep of {results_dir}; known: {', '.join(known) or 'none'}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
