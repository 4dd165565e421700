"""What a finished cell and a finished multirun show on the screen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lra import literature, stats
from lra.record import Cell, Record

SHORT = "a short run that shows that everything works. Its accuracy does not compare with published ones."

NOTES = {
    "demo": f"budget=demo: {SHORT}",
    "sweep": f"budget=sweep: {SHORT}",
    "steps": "budget=steps: a short run for its speed. Its accuracy means nothing.",
}
"""What is said of a budget that is not the published one."""


def print_cell(
    record: Record, results_dir: str | Path, console: Console | None = None, row: dict[str, Any] | None = None
) -> None:
    """Accuracy with its interval beside class prior and published value, speed, memory, and where the files are.

    `row` is the leaderboard's row of the record (`leaderboard.row_of`), which knows the other seeds. A cell that
    failed shows its status and message instead.
    """
    cell, ok = Cell.of(record), record["status"] == "ok"
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(overflow="fold")
    for name, text in [*(_results(record, row) if ok else _failure(record)), ("files", cell.directory(results_dir))]:
        lines.add_row(name, Text(str(text)))
    if ok:
        lines.add_row("tables", Text(str(Path(results_dir, "leaderboard.csv"))))
    note = NOTES.get(cell.budget)
    content = Group(lines, Text(f"\n{note}", style="bold yellow")) if note else lines
    style = "green" if ok else "red"
    panel = Panel(content, title=Text(cell.label), title_align="left", border_style=style, box=box.ROUNDED)
    (console or Console()).print(panel)


def print_multirun(
    records: Sequence[Record], console: Console | None = None, stale: Sequence[str] | None = None
) -> None:
    """One line a cell, in the order given: attention, task, seed, status, accuracy, steps per second; then what failed.

    Protocol and budget have columns only where they differ. Needs `cell` and `status` alone, so that a launcher can
    describe a cell that died before it wrote a record. `stale` says of each record why it is, or is empty.
    """
    marks = stale or [""] * len(records)
    console = console or Console()
    cells = [Cell.of(record) for record in records]
    varying = [key for key in ("protocol", "budget") if len({getattr(cell, key) for cell in cells}) > 1]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("attention", "task", *varying, "seed", "status", "accuracy %", "steps/s"):
        right = column in ("seed", "accuracy %", "steps/s")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for cell, record, mark in zip(cells, records, marks, strict=True):
        ok = record["status"] == "ok"
        name = cell.name + ("*" if record["cell"].get("starred") else "")
        names = [name, cell.task, *(getattr(cell, key) for key in varying), str(cell.seed)]
        status = Text(record["status"], style="green" if ok else "bold red")
        status.append(", stale" if mark else "", style="yellow")
        accuracy = f"{stats.accuracy(*_best(record)):.2f}" if ok else ""
        table.add_row(*map(Text, names), status, accuracy, _number(record.get("steps_per_s"), ".2f"))
    console.print(table)
    for cell, record, mark in zip(cells, records, marks, strict=True):
        if mark:
            console.print(Text(f"{cell.label}: stale, {mark}; rerun=true repeats it"))
        if record["status"] != "ok":
            message = (record.get("message") or "").strip().partition("\n")[0]
            console.print(Text(f"{cell.label}: {record['status']}{': ' if message else ''}{message}"))
    done = sum(record["status"] == "ok" for record in records)
    console.print(Text(f"{done} of {len(records)} cells ok", style="green" if done == len(records) else "bold red"))
    for note in (note for budget, note in NOTES.items() if budget in {cell.budget for cell in cells}):
        console.print(Text(note, style="yellow"))


def _results(record: Record, row: dict[str, Any] | None) -> list[tuple[str, str]]:
    correct, total = _best(record)
    low, high = stats.wilson_interval(correct, total)
    chosen = record.get("selection") or "unknown"
    lines = [
        (
            "accuracy",
            f"{stats.accuracy(correct, total):.2f} %   95 % interval {low:.1f} to {high:.1f}, "
            f"{total} test items, {'the last checkpoint' if chosen == 'last' else f'checkpoint chosen on {chosen}'}",
        ),
        ("class prior", _number(record.get("class_prior"), ".1%", missing="unknown").replace("%", " %")),
        ("published", _published(record)),
        ("speed", _number(record.get("steps_per_s"), ".2f", " steps/s", missing="not measured")),
        ("peak memory", _number(record.get("peak_mem_mib"), ",.0f", " MiB", missing="not measured on this device")),
    ]
    if row is not None and row["n_seeds"] > 1:
        seeds = f"{row['accuracy_mean']:.2f} % over {row['n_seeds']} seeds   95 % interval "
        seeds += f"{row['seed_ci95_low']:.1f} to {row['seed_ci95_high']:.1f} (Student's t)"
        lines.insert(1, ("mean", seeds))
    if row is not None and row["failures"]:
        lines.append(("failures", f"{row['failures']} other seeds of this row ({row['failure_kinds']})"))
    return lines


def _failure(record: Record) -> list[tuple[str, str]]:
    return [("status", record["status"]), ("message", record.get("message") or "none")]


def _published(record: Record) -> str:
    cell = Cell.of(record)
    known = literature.lookup(cell.attention, cell.task, cell.protocol)
    if known is None:
        return "no published value stands beside this cell"
    if known.accuracy is None:
        return f"no value: {known.setting}"
    doubt = "" if known.certainty == "source" else f" (certainty: {known.certainty})"
    if record["cell"].get("starred") or any(key.startswith("attention.") for key in cell.overrides):
        doubt += f"; does not compare, this cell overrides {', '.join(cell.overrides)}"
    return f"{known.accuracy:.2f} %   {known.source}{doubt}"


def _best(record: Record) -> stats.Count:
    return record["test"]["best"]["correct"], record["test"]["best"]["total"]


def _number(value: float | None, form: str, unit: str = "", missing: str = "") -> str:
    return missing if value is None else f"{value:{form}}{unit}"
