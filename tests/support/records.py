"""Hand-made records of cells."""

from typing import Any

from lra import report
from lra.record import FILENAME, Cell, Record, write_json


def record(
    attention: str = "softmax",
    task: str = "listops",
    seed: int = 0,
    *,
    correct: int = 700,
    total: int = 2000,
    status: str = "ok",
    protocol: str = "small",
    budget: str = "published",
    digest: str | None = None,
    device: str = "CPU",
    overrides: dict[str, Any] | None = None,
    starred: bool = False,
    **changes: Any,
) -> Record:
    """A record as the runner writes it; one that is not ok knows neither data nor device, as after an early failure."""
    cell = Cell(attention, task, protocol, budget, seed, overrides or {})
    made: Record = {
        "schema": 1,
        "kind": "cell",
        "status": status,
        "message": "",
        "cell": cell.to_dict(starred=starred),
        "config": {},
        "finished": "2026-01-01T00:00:00+00:00",
    }
    if status == "ok":
        made |= {
            "data": {"digest": digest or f"digest-of-{task}", "source": "generated", "counts": {"test": total}},
            "code": {"revision": "0123456789abcdef", "dirty": False},
            "device": {"name": device, "count": 1, "driver": None},
            "parameters": 209_802,
            "impl": "reference",
            "precision": "32",
            "selection": "validation",
            "test": {
                "best": {"step": 90, "correct": correct, "total": total},
                "last": {"step": 100, "correct": correct - 2, "total": total},
            },
            "class_prior": 0.17,
            "steps_per_s": 4.0,
            "peak_mem_mib": 100.0,
        }
    return made | changes


def store(results_dir: Any, *records: Record) -> None:
    """Write records where their cells belong."""
    for each in records:
        write_json(Cell.of(each).directory(results_dir) / FILENAME, each)


def store_and_refresh(results_dir: Any, seed: int, together: Any) -> None:
    """What a process does at the end of its cell, in the same moment as the others."""
    together.wait(timeout=60)
    store(results_dir, record(seed=seed, correct=700 + seed))
    report.refresh(results_dir)
