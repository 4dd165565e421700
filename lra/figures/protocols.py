"""The efficiency protocols of papers: ours beside what the paper printed, both as ratios; MRA's error against cost."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lra.figures import error, published
from lra.figures.labels import Label, label_marks
from lra.figures.rows import FOLDER, Picture
from lra.figures.style import QUIET, SIZES, Look, looks, plain_log, save, slug, style

TWINS = {"lra": ("LRA-T2", 4096), "skyformer": ("Skyformer-T2", None)}
"""Protocol to the published table that is its twin, and the one length of both that is drawn; None: a mean of cases."""

COSTS = (("ms_per_instance", "time (ms a sequence)"), ("mib_per_instance", "memory (MiB a sequence)"))

RATIOS = (
    "Training speed and peak memory of a step, both relative to the softmax Transformer of the same table. Left ours, "
    "right as published, on the hardware named; the axes are the same. "
)


class Ratio(NamedTuple):
    """One row: times as fast as softmax, and its share of softmax's memory."""

    name: str
    speed: float
    memory: float


def draw(results_dir: Path, table: pd.DataFrame) -> Iterable[Picture]:
    """One picture for each device and precision of a table of `lra.efficiency.paper_table` that has rows to compare."""
    scopes: Any = table.groupby(["protocol", "device", "precision"])
    for (protocol, device, precision), rows in scopes:
        path = Path(results_dir, FOLDER, f"protocol-{slug(protocol, device, precision)}")
        title = f"efficiency protocol {protocol}, {device}, {precision}"
        if "relative_error" in rows:
            if error.figure(path, title, _errors(rows)):
                yield Picture(path, f"Approximation error against time and memory: {title}", error.CAPTION)
        elif (twin := TWINS.get(protocol)) and len(ours := ratios(rows, twin[1])) > 1:
            _twins(path, title, ours, *twin, device=device)
            which = "Geometric means over the cases." if twin[1] is None else f"{twin[1]:,} tokens."
            yield Picture(path, f"Speed and memory: {title}", RATIOS + which)


def _errors(rows: pd.DataFrame) -> list[error.Panel]:
    return [
        error.Panel(f"{length:,} tokens", label, error.points(group, cost))
        for length, group in rows.groupby("length")
        for cost, label in COSTS
    ]


def ratios(rows: pd.DataFrame, length: int | None) -> list[Ratio]:
    """The ratios of each attention at one length, or their geometric means where it has all cases of the table."""
    rows = rows if length is None else rows[rows["length"] == length]  # type: ignore[assignment]
    cases = len(set(zip(rows["task"], rows["length"], strict=True)))
    found = []
    for (name, setting), mine in rows.groupby(["attention", "setting"]):  # type: ignore[misc]
        known: Any = mine[(mine["speed_ratio"] > 0) & (mine["memory_ratio"] > 0)]
        if len(known) == cases:
            means = (statistics.geometric_mean(known[column]) for column in ("speed_ratio", "memory_ratio"))
            found.append(Ratio(f"{name} ({setting})" if setting else str(name), *means))
    return found


def _twins(path: Path, title: str, ours: Sequence[Ratio], table: str, length: int | None, device: str) -> None:
    places = () if length is None else (str(length),)
    both = published.relative(table, places)
    theirs = [Ratio(model, speed, memory) for model, (speed, memory) in both.items() if speed * memory > 0]
    sides = (
        (device, ours, looks(row.name for row in ours), False),
        (f"published: {published.hardware(table)}", theirs, published.known(row.name for row in theirs), True),
    )
    with style():
        figure = Figure(figsize=(8.7, 3.9), layout="constrained")
        figure.suptitle(title, fontsize=SIZES["title"])
        axes: Any = figure.subplots(1, 2, sharex=True, sharey=True)
        labels = [(one, _side(one, *side)) for one, side in zip(axes, sides, strict=True)]
        every = [*ours, *theirs]
        axes[0].set(xscale="log", yscale="log", ylabel="peak memory (softmax = 1)")
        axes[0].margins(0.15)
        plain_log(axes[0].xaxis, min(row.speed for row in every), max(row.speed for row in every))
        plain_log(axes[0].yaxis, min(row.memory for row in every), max(row.memory for row in every))
        label_marks(figure, labels)
        save(figure, path)


def _side(axes: Axes, title: str, rows: Sequence[Ratio], known: Mapping[str, Look], hollow: bool) -> list[Label]:
    for row in sorted(rows):
        mark: Any = known[row.name].mark(hollow=hollow)
        axes.plot(row.speed, row.memory, **mark)
    for line in (axes.axvline, axes.axhline):
        line(1, color=QUIET, linestyle="--", linewidth=0.8, zorder=1)
    axes.set_title(title)
    axes.set_xlabel("training speed (softmax = 1)")
    return [Label(row.speed, row.memory, row.name, known[row.name].colour) for row in rows]
