"""The trade-off plot of the LRA papers: accuracy against speed, the area of a disc the peak memory."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lra.figures.labels import Label, label_marks
from lra.figures.rows import FOLDER, SCOPE, Picture, grid, panels, scopes, shape, title_of
from lra.figures.style import SIZES, Look, looks, plain_log, save, slug, style
from lra.leaderboard import ROW, row_key
from lra.record import Record

CAPTION = (
    "Test accuracy against training speed (log scale); the area of a disc is the peak memory of a step. "
    "Speeds of cells that had the device for themselves, the median over seeds. "
)
INTERVALS = "vertical lines: 95 % interval of the test set"
ONE_TASK = f"{INTERVALS.capitalize()}."
SUITE = "Average over the tasks of a suite, of rows that are complete in it; geometric mean of their speeds."

LARGEST = 900.0
"""Area of the largest disc of a panel, in square points."""

ENOUGH = 2
"""A trade-off needs so many rows."""


class Disc(NamedTuple):
    """One row of a panel; `interval` of its accuracy where that is of one task."""

    name: str
    speed: float
    accuracy: float
    memory: float
    interval: tuple[float, float] | None = None


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    accuracy_label: str
    speed_label: str
    memory_unit: str
    discs: Sequence[Disc]


def draw(
    results_dir: Path, leaderboard: pd.DataFrame, summary: pd.DataFrame, records: Iterable[Record]
) -> Iterable[Picture]:
    """One picture for each protocol, budget and device: suites where all rows are complete in one, or else tasks."""
    speeds = speeds_of(records)
    for scope, rows in scopes(leaderboard):
        timed: Any = rows.assign(speed=[speeds.get(tuple(key)) for key in rows[list(ROW)].itertuples(index=False)])
        timed = timed[timed["speed"].notna() & timed["steps_per_s"].notna()]
        shown, note = _suites(timed, summary, scope), SUITE
        each = _tasks(timed)
        if not _rows(each) <= _rows(shown):  # no row is left out
            shown, note = each, ONE_TASK
        if shown:
            path, title = Path(results_dir, FOLDER, f"tradeoff-{slug(*scope)}"), title_of(*scope)
            figure(path, title, shown, looks(disc.name for panel in shown for disc in panel.discs))
            yield Picture(path, f"Accuracy, speed and memory: {title}", CAPTION + note)


def speeds_of(records: Iterable[Record]) -> dict[tuple[str, ...], float]:
    """Steps per second of each row of the leaderboard: the median over the cells that are known to have been alone."""
    found: dict[tuple[str, ...], list[float]] = {}
    for record in records:
        alone = (record.get("device") or {}).get("sharing") == 1
        if record["status"] == "ok" and alone and record.get("steps_per_s"):
            found.setdefault(row_key(record), []).append(record["steps_per_s"])
    return {key: statistics.median(speeds) for key, speeds in found.items()}


def _rows(shown: Iterable[Panel]) -> set[str]:
    """The rows of the panels but for starred ones, which are in no suite."""
    return {disc.name for panel in shown for disc in panel.discs if not disc.name.endswith("*")}


def _tasks(rows: pd.DataFrame) -> list[Panel]:
    shown = []
    for task, group in panels(rows):
        discs = [
            Disc(row["name"], row["speed"], row["accuracy_mean"], row["peak_mem_mib"],
                 (row["test_ci95_low"], row["test_ci95_high"]))
            for row in group.to_dict("records")
        ]  # fmt: skip
        if len(discs) >= ENOUGH:
            shown.append(Panel(task, "accuracy (%)", "training steps per second", "MiB", discs))
    return shown


def _suites(rows: Any, summary: Any, scope: tuple[str, str, str]) -> list[Panel]:
    shown = []
    data = rows["task"].astype(str) + ":" + rows["data_digest"].astype(str)
    here = summary[summary["average"].notna() & (summary[SCOPE] == list(scope)).all(axis=1)]
    for suite, complete in here.groupby("suite"):
        discs = []
        for row in complete.to_dict("records"):
            sources = row["data_digests"].split()
            cells = rows[(rows["attention"] == row["attention"]) & data.isin(sources)]
            if len(cells) == len(sources):
                speed = statistics.geometric_mean(cells["speed"])
                discs.append(Disc(cells["name"].iloc[0], speed, row["average"], cells["peak_mem_mib"].max()))
        if len(discs) >= ENOUGH:
            accuracy = f"average accuracy, suite {suite} (%)"
            shown.append(Panel(f"suite {suite}", accuracy, "training steps per second", "MiB", discs))
    return shown


def figure(path: Path, title: str, shown: Sequence[Panel], known: Mapping[str, Look], *, hollow: bool = False) -> None:
    """Write `path`.svg and `path`.png: panels of discs, each with its look; hollow ones are published."""
    down, across = shape(len(shown))
    with style():
        made = Figure(figsize=(4.1 * across + 0.5, 0.4 + 3.6 * down), layout="constrained")
        intervals = any(disc.interval for panel in shown for disc in panel.discs)
        made.suptitle(f"{title}; {INTERVALS}" if intervals else title, fontsize=SIZES["title"])
        labels = []
        for axes, panel in zip(grid(made, len(shown)), shown, strict=True):
            labels.append((axes, _panel(axes, panel, known, hollow)))
        label_marks(made, labels)
        save(made, path)


def _panel(axes: Axes, panel: Panel, known: Mapping[str, Look], hollow: bool) -> list[Label]:
    largest = max((disc.memory for disc in panel.discs if disc.memory > 0), default=math.nan)
    labels = []
    for disc in sorted(panel.discs, key=lambda disc: (-_known(disc.memory), disc.name)):  # small discs on large ones
        look, area = known[disc.name], LARGEST * _known(disc.memory) / largest if largest > 0 else 0.0
        if disc.interval:
            axes.plot((disc.speed, disc.speed), disc.interval, color=look.colour, linewidth=0.8, alpha=0.6, zorder=2)
        if area:
            fill: dict[str, Any] = {"facecolor": "none"} if hollow else {"facecolor": look.colour, "alpha": 0.3}
            axes.scatter(disc.speed, disc.accuracy, s=area, linewidth=0, zorder=2.5, **fill)
            axes.scatter(disc.speed, disc.accuracy, s=area, facecolor="none", edgecolor=look.colour, linewidth=1)
        mark: Any = look.mark(hollow=hollow) | {"markersize": 3.5}
        axes.plot(disc.speed, disc.accuracy, zorder=3, **mark)
        radius = max(2.5, math.sqrt(area / math.pi))
        labels.append(Label(disc.speed, disc.accuracy, disc.name, look.colour, radius))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.speed_label)
    axes.set_ylabel(panel.accuracy_label)
    _scales(axes, panel.discs)
    if largest > 0:
        _key(axes, largest, panel.memory_unit)
    return labels


def _known(memory: float) -> float:
    """Memory, or 0 where none was measured."""
    return memory if memory > 0 else 0.0


def _scales(axes: Axes, discs: Sequence[Disc]) -> None:
    """Room for discs and names, and ticks that are plain numbers."""
    axes.set_xscale("log")
    speeds = [disc.speed for disc in discs]
    room = max((max(speeds) / min(speeds)) ** 0.2, 1.25)
    axes.set_xlim(min(speeds) / room, max(speeds) * room)
    plain_log(axes.xaxis, min(speeds), max(speeds))
    low, high = axes.get_ylim()
    reach = max(0.12 * (high - low), 0.5)
    axes.set_ylim(low - reach, high + reach)


def _key(axes: Axes, largest: float, unit: str) -> None:
    """Two discs of round sizes, below the axes."""
    broadest = 2 * math.sqrt(LARGEST / math.pi)
    handles = [Line2D([], [], linestyle="none", label="area: peak memory")]
    for size in (_round(largest), _round(largest / 4)):
        width = broadest * math.sqrt(size / largest)
        look: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": "0.3", "linestyle": "none"}
        handles.append(Line2D([], [], markersize=width, label=f"{size:g} {unit}", **look))
    text = SIZES["note"]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=3, fontsize=text, frameon=False,
        handlelength=broadest / text, handleheight=broadest / text, columnspacing=1.0,
    )  # fmt: skip


def _round(value: float) -> float:
    """The largest of 1, 2, 5 · 10^k that is at most `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(step * power for step in (1, 2, 5) if step * power <= value * (1 + 1e-9))
