"""A card for every cell: how it ended, how to run it again, on what it ran, its learning curve."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from lra import stats
from lra.figures.curves import points_of
from lra.figures.style import looks
from lra.leaderboard import row_key
from lra.page.markup import Markup, join, tag
from lra.record import Cell, Record, device_of, digest_of

PLAIN = re.compile(r"[A-Za-z0-9_./+-]+")
"""Text that Hydra reads as itself."""

WIDTH, HEIGHT = 320, 72
"""Of a curve, in pixels."""


def command(cell: Cell) -> str:
    """The line that runs a cell again, to be pasted into a shell."""
    names = {key: getattr(cell, key) for key in ("attention", "task", "protocol", "budget", "seed")}
    chosen = [f"{key}={_typed(value)}" for key, value in {**names, **cell.overrides}.items()]
    return shlex.join(["python", "run.py", *chosen])


def _typed(value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else "'" + value.replace("\\", r"\\").replace("'", r"\'") + "'"
    if isinstance(value, Sequence):
        return f"[{','.join(map(_typed, value))}]"
    return json.dumps(value)


def render(records: Iterable[Record]) -> Markup:
    """The cards, by protocol, budget, task, attention and seed."""
    cells = sorted(records, key=lambda record: (*row_key(record)[2:4], *_place(record)))
    return join(*map(_card, cells), between="\n")


def _place(record: Record) -> tuple[Any, ...]:
    attention, task, _, _, digest, device = row_key(record)
    return task, attention, record["cell"]["seed"], digest, device


def _card(record: Record) -> Markup:
    cell, status = Cell.of(record), record["status"]
    starred = "*" if record["cell"].get("starred") else ""
    accuracy = f"{stats.accuracy(*_best(record)):.2f} %" if status == "ok" else ""
    head = tag(
        "summary",
        tag("span", f"{cell.name}{starred} {cell.task} seed {cell.seed}", class_="name"),
        tag("span", accuracy, class_="number"),
        tag("span", status, class_=f"status {'ok' if status == 'ok' else 'failed'}"),
    )
    facts = [(name, value) for name, value in _facts(record, cell) if value]
    lines = [join(tag("dt", name), tag("dd", value)) for name, value in facts]
    body = [tag("pre", command(cell)), tag("dl", *lines), _curve(record, cell)]
    return tag("details", head, *body, class_="card", data_status="ok" if status == "ok" else "failed")


def _facts(record: Record, cell: Cell) -> list[tuple[str, str]]:
    code, counts, wall = record.get("code") or {}, _part(record.get("data"), "counts"), _part(record, "wall_s")
    changed = ", with uncommitted changes" if code.get("dirty") else ""
    revision = f"{code['revision']}{changed}" if code.get("revision") else "not recorded"
    versions = " ".join(f"{name} {version}" for name, version in _part(record, "versions").items() if version)
    sharing = (record.get("device") or {}).get("sharing")
    shared = "" if sharing in (None, 1) else f", shared by {sharing} cells"
    return [
        ("message", str(record.get("message") or "")),
        ("test", _tested(record)),
        ("protocol, budget", f"{cell.protocol}, {cell.budget}"),
        ("overrides", " ".join(f"{key}={json.dumps(value)}" for key, value in cell.overrides.items())),
        ("commit", revision),
        ("device", device_of(record) + shared),
        ("data", f"{digest_of(record)[:12]} {_sizes(counts)}".strip()),
        ("computed by", " ".join(str(record[key]) for key in ("impl", "precision") if record.get(key))),
        ("speed", _number(record.get("steps_per_s"), ".2f", " steps/s")),
        ("peak memory", _number(record.get("peak_mem_mib"), ",.0f", " MiB")),
        ("seconds", ", ".join(f"{name} {float(seconds):.1f}" for name, seconds in wall.items())),
        ("versions", versions),
        ("finished", str(record.get("finished") or "")),
    ]


def _part(record: Any, key: str) -> dict[str, Any]:
    """A section of a record that the tables do not rely on; empty where it is not what it should be."""
    part = (record or {}).get(key)
    return part if isinstance(part, dict) else {}


def _tested(record: Record) -> str:
    if record["status"] != "ok":
        return ""
    (correct, total), step = _best(record), record["test"]["best"].get("step")
    low, high = stats.wilson_interval(correct, total)
    at = "" if step is None else f", checkpoint of step {step:,}"
    return f"{correct:,} of {total:,} right, 95 % interval {low:.1f} to {high:.1f}{at}"


def _sizes(counts: dict[str, Any]) -> str:
    return " / ".join(f"{name} {count:,}" for name, count in counts.items())


def _best(record: Record) -> stats.Count:
    return record["test"]["best"]["correct"], record["test"]["best"]["total"]


def _number(value: float | None, form: str, unit: str) -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _curve(record: Record, cell: Cell) -> Markup:
    """Validation accuracy against the step as a small picture, its last value beside it; nothing without two points."""
    points = points_of(record)
    if len(points) < 2:
        return Markup("")
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    across, up = max(steps[-1], 1), max(high - low, 1e-9)
    corners = " ".join(f"{WIDTH * s / across:.1f},{HEIGHT - HEIGHT * (v - low) / up:.1f}" for s, v in points)
    colour = looks([cell.name])[cell.name].colour
    line = tag("polyline", points=corners, fill="none", stroke=colour, stroke_width="1.5")
    text = f"validation {low:.1f} to {high:.1f} %, last {values[-1]:.1f} % at step {steps[-1]:,}"
    box = f"-2 -2 {WIDTH + 4} {HEIGHT + 4}"
    picture = tag("svg", line, viewBox=box, width=str(WIDTH), height=str(HEIGHT), role="img", aria_label=text)
    return tag("figure", picture, tag("figcaption", text), class_="curve")
