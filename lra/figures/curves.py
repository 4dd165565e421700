"""Learning curves: validation accuracy against the step, the median over seeds and their range."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lra import stats
from lra.figures.labels import Label, label_ends
from lra.figures.rows import FOLDER, Picture, grid, panels, scopes, shape, title_of
from lra.figures.style import QUIET, SIZES, looks, save, slug, style
from lra.leaderboard import ROW, row_key
from lra.record import Record

CAPTION = (
    "Validation accuracy while training: the median over the seeds of a row, and the range from the lowest to the "
    "highest. Dashed line: class prior."
)

MOST_TICKS = 5

POINT = ("step", "validation_correct", "validation_total")

Curve = dict[int, list[float]]
"""A step to the accuracies of the seeds that were validated there, in per cent."""


def curves_of(records: Iterable[Record]) -> dict[tuple[str, ...], Curve]:
    """The curves of finished cells, by row of the leaderboard."""
    found: dict[tuple[str, ...], Curve] = {}
    for record in records:
        if record["status"] == "ok":
            for step, accuracy in points_of(record):
                found.setdefault(row_key(record), defaultdict(list))[step].append(accuracy)
    return found


def points_of(record: Record) -> list[tuple[int, float]]:
    """(step, validation accuracy in per cent) of a cell, in order; what is no such point is left out."""
    points = {}
    curve = record.get("curve")
    for point in curve if isinstance(curve, list) else []:
        step, correct, total = (point.get(key) if isinstance(point, Mapping) else None for key in POINT)
        if isinstance(step, int) and isinstance(correct, int) and isinstance(total, int) and total > 0:
            points[step] = stats.accuracy(correct, total)
    return sorted(points.items())


def draw(results_dir: Path, leaderboard: pd.DataFrame, records: Iterable[Record]) -> Iterable[Picture]:
    """One picture for each protocol, budget and device with a curve of at least two points; a panel for each task."""
    curves = {key: curve for key, curve in curves_of(records).items() if len(curve) > 1}
    for scope, rows in scopes(leaderboard):
        drawn: Any = rows[[tuple(key) in curves for key in rows[list(ROW)].itertuples(index=False)]]
        if len(drawn):
            path, title = Path(results_dir, FOLDER, f"curves-{slug(*scope)}"), title_of(*scope)
            _draw(path, title, panels(drawn), curves)
            yield Picture(path, f"Learning curves: {title}", CAPTION)


def _draw(path: Path, title: str, tasks: list[tuple[str, pd.DataFrame]], curves: Mapping[Any, Curve]) -> None:
    down, across = shape(len(tasks))
    tallest = max(len(rows) for _, rows in tasks)
    with style():
        size = (max(5.6, 4.0 * across), 0.4 + down * max(2.9, 0.6 + 0.125 * tallest))
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=SIZES["title"])
        known = looks(name for _, rows in tasks for name in rows["name"])
        labels = []
        for axes, (task, rows) in zip(grid(figure, len(tasks)), tasks, strict=True):
            axes.set_title(task)
            labels.append((axes, [_curve(axes, row, curves, known) for row in rows.to_dict("records")]))
            for prior in sorted(set(rows["class_prior"].dropna())):
                axes.axhline(prior, color=QUIET, linestyle="--", linewidth=0.8, zorder=1)
            axes.set_xlim(0, 1.01 * max(label.x for label in labels[-1][1]))
            axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS))
            axes.set_xlabel("training step")
            axes.set_ylabel("validation accuracy (%)")
        figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False, fontsize=SIZES["note"])
        label_ends(figure, labels)
        save(figure, path)


def _curve(axes: Axes, row: Mapping[Any, Any], curves: Mapping[Any, Curve], known: Any) -> Label:
    curve, look = curves[tuple(row[key] for key in ROW)], known[row["name"]]
    steps = sorted(curve)
    middle = [statistics.median(curve[step]) for step in steps]
    if any(len(values) > 1 for values in curve.values()):
        low, high = [min(curve[step]) for step in steps], [max(curve[step]) for step in steps]
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.12, linewidth=0)
    axes.plot(steps, middle, **look.line() | {"markevery": [len(steps) - 1], "linewidth": 1.0})
    return Label(steps[-1], middle[-1], f"{row['name']} {middle[-1]:.1f}", look.colour)


def _legend() -> list[Any]:
    return [
        Line2D([], [], color="black", linewidth=1.0, label="median over seeds"),
        Patch(color="black", alpha=0.12, linewidth=0, label="lowest to highest seed"),
        Line2D([], [], color=QUIET, linestyle="--", linewidth=0.8, label="class prior"),
    ]
