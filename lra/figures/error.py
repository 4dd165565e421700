"""MRA's plot: how far an attention is from softmax against the time it takes, from the rows of `lens.csv`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lra.figures.labels import Label, label_marks
from lra.figures.rows import FOLDER, Picture, grid, shape
from lra.figures.style import QUIET, SIZES, Look, looks, plain_log, save, slug, style

CAPTION = (
    "Relative error of the output against exact attention on the same q, k, v, and the time of one forward call. "
    "Settings of one method are joined. Dashed line: the time of exact attention."
)

EXACT = "softmax"
SAME = 1e-6
"""An error below it is rounding: the row is exact and has no place on a logarithmic axis."""

PANEL = ["source", "protocol", "task", "layer", "length"]
"""What stands on one pair of axes; `layer` is empty for Gaussian inputs."""


def draw(results_dir: Path, lens: pd.DataFrame) -> Iterable[Picture]:
    """One picture for each device with rows that have an error and a time; a panel for each source, layer and length.

    lens   the table of `lra.lens.table`
    """
    timed: Any = lens[(lens["scale"] == 1) & (lens["ms"] > 0) & lens["relative_error"].notna()]
    for device, rows in timed.groupby("device"):
        panels = [(key, group) for key, group in rows.groupby(PANEL, dropna=False) if _inexact(group).any()]
        if panels:
            path = Path(results_dir, FOLDER, f"error-{slug(str(device))}")
            _draw(path, str(device), panels)
            yield Picture(path, f"Approximation error against time: {device}", CAPTION)


def _inexact(rows: pd.DataFrame) -> Any:
    return rows["relative_error"] > SAME


def _draw(path: Path, device: str, panels: Sequence[tuple[Any, pd.DataFrame]]) -> None:
    down, across = shape(len(panels))
    with style():
        figure = Figure(figsize=(4.1 * across + 0.5, 0.4 + 3.3 * down), layout="constrained")
        figure.suptitle(f"one forward call, {device}", fontsize=SIZES["title"])
        labels = []
        for axes, (key, rows) in zip(grid(figure, len(panels)), panels, strict=True):
            source, protocol, task, layer, length = key
            where = "" if pd.isna(layer) else f", layer {int(layer)}"
            axes.set_title(f"{source}{where}\n{task}, protocol {protocol}, {int(length)} tokens")
            labels.append((axes, _panel(axes, rows)))
        label_marks(figure, labels)
        save(figure, path)


def _panel(axes: Axes, rows: Any) -> list[Label]:
    rows = rows.assign(name=[*map(_name, rows["attention"], rows["setting"])])
    known = looks(rows["attention"])
    labels = []
    for method, points in rows[_inexact(rows)].sort_values(["ms", "name"]).groupby("attention"):
        look: Look = known[str(method)]
        axes.plot(points["ms"], points["relative_error"], **look.line())
        labels += [
            Label(row["ms"], row["relative_error"], row["name"], look.colour) for row in points.to_dict("records")
        ]
    exact = rows[rows["attention"] == EXACT]
    for ms in exact["ms"]:
        axes.axvline(ms, color=QUIET, linestyle="--", linewidth=0.8, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="time (ms)", ylabel="relative error")
    axes.margins(0.18)
    plain_log(axes.xaxis, min(rows["ms"]), max(rows["ms"]))
    errors = [label.y for label in labels]
    plain_log(axes.yaxis, min(errors), max(errors))
    return labels


def _name(attention: str, setting: Any) -> str:
    return f"{attention} ({setting})" if isinstance(setting, str) and setting else attention
