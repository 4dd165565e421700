"""MRA's plot: how far an attention is from softmax against what it costs."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lra.figures.labels import Label, label_marks
from lra.figures.rows import FOLDER, Picture, grid, shape
from lra.figures.style import QUIET, SIZES, Look, looks, plain_log, save, slug, style

CAPTION = (
    "Relative error of the output against exact attention on the same q, k, v, and what the call costs. "
    "Settings of one method are joined. Dashed line: exact attention."
)

EXACT = "softmax"
SAME = 1e-6
"""An error below it is rounding: the row is exact and has no place on a logarithmic axis."""

PANEL = ["source", "protocol", "task", "layer", "length"]
"""What stands on one pair of axes; `layer` is empty for Gaussian inputs."""


class Point(NamedTuple):
    """One setting of an attention."""

    attention: str
    setting: str
    cost: float
    error: float


class Panel(NamedTuple):
    """One pair of axes; `label` is that of the cost."""

    title: str
    label: str
    points: Sequence[Point]


def draw(results_dir: Path, lens: pd.DataFrame) -> Iterable[Picture]:
    """One picture for each device with rows that have an error and a time; a panel for each source, layer and length.

    lens   the table of `lra.lens.table`
    """
    timed: Any = lens[(lens["scale"] == 1) & (lens["ms"] > 0) & lens["relative_error"].notna()]
    for device, rows in timed.groupby("device"):
        shown = [_of_lens(key, group) for key, group in rows.groupby(PANEL, dropna=False)]
        path = Path(results_dir, FOLDER, f"error-{slug(str(device))}")
        if figure(path, f"one forward call, {device}", shown):
            yield Picture(path, f"Approximation error against time: {device}", CAPTION)


def _of_lens(key: Any, rows: pd.DataFrame) -> Panel:
    source, protocol, task, layer, length = key
    where = "" if pd.isna(layer) else f", layer {int(layer)}"
    title = f"{source}{where}\n{task}, protocol {protocol}, {int(length)} tokens"
    return Panel(title, "time (ms)", points(rows, "ms"))


def points(rows: pd.DataFrame, cost: str) -> list[Point]:
    """The points of a table with columns attention, setting, relative_error and a cost, where both are known."""
    return [
        Point(row["attention"], "" if pd.isna(row["setting"]) else row["setting"], row[cost], row["relative_error"])
        for row in rows.to_dict("records")
        if row[cost] > 0 and row["relative_error"] >= 0
    ]


def figure(path: Path, title: str, panels: Sequence[Panel]) -> bool:
    """Write `path`.svg and `path`.png of the panels with a point that is not exact; False where there is none."""
    panels = [panel for panel in panels if any(point.error > SAME for point in panel.points)]
    if not panels:
        return False
    down, across = shape(len(panels))
    known = looks(point.attention for panel in panels for point in panel.points)
    with style():
        made = Figure(figsize=(4.1 * across + 0.5, 0.4 + 3.3 * down), layout="constrained")
        made.suptitle(title, fontsize=SIZES["title"])
        axes = grid(made, len(panels))
        label_marks(made, [(one, _panel(one, panel, known)) for one, panel in zip(axes, panels, strict=True)])
        save(made, path)
    return True


def _panel(axes: Axes, panel: Panel, known: Mapping[str, Look]) -> list[Label]:
    inexact = sorted(point for point in panel.points if point.error > SAME)
    labels = []
    for method in sorted({point.attention for point in inexact}):
        mine = sorted((point for point in inexact if point.attention == method), key=lambda point: point.cost)
        axes.plot([point.cost for point in mine], [point.error for point in mine], **known[method].line())
        names = _names(method, [point.setting for point in mine])
        labels += [
            Label(point.cost, point.error, name, known[method].colour) for point, name in zip(mine, names, strict=True)
        ]
    for cost in sorted(point.cost for point in panel.points if point.attention == EXACT):
        axes.axvline(cost, color=QUIET, linestyle="--", linewidth=0.8, zorder=1)
    axes.set_title(panel.title)
    axes.set(xscale="log", yscale="log", xlabel=panel.label, ylabel="relative error")
    axes.margins(0.18)
    costs, errors = [point.cost for point in panel.points], [point.error for point in inexact]
    plain_log(axes.xaxis, min(costs), max(costs))
    plain_log(axes.yaxis, min(errors), max(errors))
    return labels


def _names(method: str, settings: Sequence[str]) -> list[str]:
    """Of the points of a method: the first in full, and of others that set the same option their value alone."""
    option = {setting.rpartition("=")[0] for setting in settings}
    names = [f"{method} ({setting})" if setting else method for setting in settings]
    if len(option) == 1 and all(setting.count("=") == 1 for setting in settings):
        names[1:] = [setting.rpartition("=")[2] for setting in settings[1:]]
    return names
