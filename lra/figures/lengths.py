"""Time and memory against length on log-log axes, every curve named at its end with its slope."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lra.efficiency.table import loglog_slope
from lra.figures.labels import Label, label_ends
from lra.figures.style import SIZES, Look, plain_log, save, style

CAPTION = "Log-log axes; behind each name the slope of its curve (1 is linear in the length, 2 quadratic)."


MOST_TICKS = 7


class Panel(NamedTuple):
    """One pair of axes: curves by name, each as (length, value) in order; values are positive."""

    title: str
    label: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


def figure(path: Path, title: str, panels: Sequence[Sequence[Panel]], known: Mapping[str, Look]) -> None:
    """Write `path`.svg and `path`.png: rows of panels, each curve with its look."""
    with style():
        tallest = max(len(panel.curves) for row in panels for panel in row)
        size = (4.3 * len(panels[0]), 0.4 + len(panels) * max(3.0, 0.7 + 0.125 * tallest))
        made = Figure(figsize=size, layout="constrained")
        made.suptitle(f"{title}; in brackets the slope of a curve", fontsize=SIZES["title"])
        axes = made.subplots(len(panels), len(panels[0]), squeeze=False)
        labels = []
        for axes_row, row in zip(axes, panels, strict=True):
            labels += [(one, _panel(one, panel, known)) for one, panel in zip(axes_row, row, strict=True)]
        label_ends(made, labels)
        save(made, path)


def _panel(axes: Axes, panel: Panel, known: Mapping[str, Look]) -> list[Label]:
    labels = []
    for name, points in sorted(panel.curves.items()):
        lengths, values = zip(*points, strict=True)
        axes.plot(lengths, values, **known[name].line())
        slope = loglog_slope(pd.Series(lengths), pd.Series(values))
        text = name if pd.isna(slope) else f"{name} ({slope:.2f})"
        labels.append(Label(lengths[-1], values[-1], text, known[name].colour))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({length for points in panel.curves.values() for length, _ in points})
    named = ticks[::-1][:: max(1, -(-len(ticks) // MOST_TICKS))]
    axes.set_xticks(ticks, [_tokens(n) if n in named else "" for n in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    values = [value for points in panel.curves.values() for _, value in points]
    plain_log(axes.yaxis, min(values, default=1), max(values, default=1))
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel(panel.label)
    axes.set_title(panel.title)
    return labels


def _tokens(count: float) -> str:
    return f"{count / 1024:g}k" if count >= 1024 else f"{count:g}"
