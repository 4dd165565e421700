"""The speed of training: one row an (attention, task, …, device), beside the floor of no attention at all."""

from collections.abc import Iterable
from typing import Any, cast

import pandas as pd

from lra.leaderboard import row_key
from lra.record import Record

SCOPE = ["task", "protocol", "budget", "data_digest", "device", "precision", "torch"]
"""What a ratio never mixes."""

SECONDS = ("first_step_cold_s", "first_step_warm_s", "train_s", "compile_s", "validate_s", "wall_s")

COLUMNS = {
    **dict.fromkeys(["attention", *SCOPE, "impl"], "object"),
    "n_seeds": "int64",
    "steps": "int64",
    "ms_per_step": "float64",  # median over seeds; dropout, the attention's own loss and the padding included
    "floor_ratio": "float64",  # over `none` of the same scope; empty without it
    "lightning_overhead": "float64",  # over the same steps in a bare loop, as a share of it; empty if not measured
    "peak_mem_mib": "float64",  # largest of the seeds
    **dict.fromkeys(SECONDS, "float64"),  # medians of cells that one process trained; train without validation
}


def steps(records: Iterable[Record]) -> pd.DataFrame:
    """The table of `distinct` records: finished cells that had a GPU for themselves. Sorted, the fastest first."""
    cells = pd.DataFrame([_cell(record) for record in records if _counts(record)])
    if cells.empty:
        return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)
    groups = cast(Any, cells.groupby(["attention", *SCOPE, "impl"], as_index=False))
    medians = {column: (column, "median") for column in ("ms_per_step", "lightning_overhead", *SECONDS)}
    table = groups.agg(
        n_seeds=("seed", "nunique"), steps=("steps", "max"), peak_mem_mib=("peak_mem_mib", "max"), **medians
    )
    floors = table[table["attention"] == "none"].groupby(SCOPE)["ms_per_step"].min().rename("floor")
    table = table.join(floors, on=SCOPE)
    table["floor_ratio"] = table["ms_per_step"] / table["floor"]
    table = table[list(COLUMNS)].astype(COLUMNS)
    return table.sort_values(by=[*SCOPE, "ms_per_step", "attention", "impl"], ignore_index=True)


NEEDED = ("steps", "steps_per_s", "peak_mem_mib", "precision", "impl", "wall_s", "versions")
"""What a row is made of; a record that lacks any of it gives none."""


def _counts(record: Record) -> bool:
    device = record.get("device") or {}
    alone = device.get("sharing") == 1 and not str(device.get("name")).startswith("CPU")
    return alone and record["status"] == "ok" and all(record.get(key) for key in NEEDED)


def _cell(record: Record) -> dict[str, Any]:
    attention, task, protocol, budget, digest, device = row_key(record)
    bare = record.get("bare_steps_per_s")
    return {
        "attention": attention,
        "task": task,
        "protocol": protocol,
        "budget": budget,
        "data_digest": digest,
        "device": device,
        "precision": record["precision"],
        "torch": record["versions"]["torch"],
        "impl": record["impl"],
        "seed": record["cell"]["seed"],
        "steps": record["steps"],
        "ms_per_step": 1000 / record["steps_per_s"],
        "lightning_overhead": bare / record["steps_per_s"] - 1 if bare else None,
        "peak_mem_mib": record["peak_mem_mib"],
        **_seconds(record),
    }


def _seconds(record: Record) -> dict[str, float | None]:
    """`SECONDS` of a cell; none where several processes trained it, since the last one knows only its own."""
    if (record.get("processes") or 1) > 1:
        return dict.fromkeys(SECONDS)
    wall, cache = record["wall_s"], record.get("compile_cache")
    return {
        "first_step_cold_s": record["first_step_s"] if cache == "cold" else None,
        "first_step_warm_s": record["first_step_s"] if cache == "warm" else None,
        "train_s": wall["train"],
        "compile_s": wall.get("compile", 0.0),
        "validate_s": wall["validate"],
        "wall_s": wall["total"],
    }
