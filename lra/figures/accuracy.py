"""Accuracy of every row of a task with its 95 % intervals, beside the class prior and the published value."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lra.figures.rows import FOLDER, Picture, grid, panels, scopes, shape, title_of
from lra.figures.style import QUIET, SIZES, looks, save, slug, style

CAPTION = (
    "Mean test accuracy over seeds at the best validation step. Thin line: 95 % interval of the test set (Wilson). "
    "Broad band: 95 % interval over seeds (Student's t), none for one seed, cut where it leaves the panel. "
    "Dashed line: class prior, or its value below the panel where it lies far from every row. "
    "Hollow mark: published value, where it compares; its source stands in the table."
)


def draw(results_dir: Path, leaderboard: pd.DataFrame) -> Iterable[Picture]:
    """One picture for each protocol, budget and device; a panel for each task."""
    for (protocol, budget, device), rows in scopes(leaderboard):
        path = Path(results_dir, FOLDER, f"accuracy-{slug(protocol, budget, device)}")
        title = title_of(protocol, budget, device)
        _draw(path, title, panels(rows))
        yield Picture(path, f"Accuracy: {title}", CAPTION)


def _draw(path: Path, title: str, tasks: list[tuple[str, pd.DataFrame]]) -> None:
    down, across = shape(len(tasks))
    tallest = max(len(rows) for _, rows in tasks)
    with style():
        size = (0.3 + 3.4 * across if across > 1 else 5.2, 0.75 + down * (0.55 + 0.2 * tallest))
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=SIZES["title"])
        known = looks(name for _, rows in tasks for name in rows["name"])
        for axes, (task, rows) in zip(grid(figure, len(tasks)), tasks, strict=True):
            axes.set_title(task)
            _panel(axes, rows, known)
        figure.legend(handles=_legend(), loc="outside lower center", ncols=4, frameon=False, fontsize=SIZES["note"])
        save(figure, path)


def _panel(axes: Axes, rows: pd.DataFrame, known: Any) -> None:
    rows = rows.sort_values(["accuracy_mean", "name"], ascending=[False, True])
    for at, row in enumerate(rows.to_dict("records")):
        look = known[row["name"]]
        if pd.notna(row["seed_ci95_low"]):
            band = (row["seed_ci95_low"], row["seed_ci95_high"])
            axes.plot(band, (at, at), color=look.pale, linewidth=5, solid_capstyle="butt", zorder=1.5)
        axes.plot((row["test_ci95_low"], row["test_ci95_high"]), (at, at), color=look.colour, linewidth=1)
        if pd.notna(row["gap"]):  # not beside a demo, nor a row whose overrides keep it from comparing
            axes.plot(row["published"], at, **look.mark(hollow=True), zorder=3)
        axes.plot(row["accuracy_mean"], at, **look.mark(), zorder=4)
    low, high = _limits(rows)
    far = []
    for prior in sorted(set(rows["class_prior"].dropna())):
        axes.axvline(prior, color=QUIET, linestyle="--", linewidth=0.8, zorder=1)
        far += [] if low < prior < high else [f"class prior {prior:.3g}"]
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows.to_dict("records")])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(low, high)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("; ".join(["accuracy (%)", *far]))


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Where every row can be seen, and told from the others: not an interval of two or three seeds, which may be
    absurdly long, nor a class prior so far off that the rows would share less than a quarter of the panel."""
    compared = rows["published"].where(rows["gap"].notna())
    shown = rows[["test_ci95_low", "test_ci95_high"]].assign(published=compared).to_numpy().ravel()
    shown = shown[~pd.isna(shown)].astype(float)
    low, high = float(shown.min()), float(shown.max())
    reach = 3 * (high - low)
    near = [prior for prior in rows["class_prior"].dropna() if low - reach <= prior <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    room = 0.04 * (high - low)
    return low - room, high + room


def _name(row: dict[Any, Any]) -> str:
    """The attention, and what should not be overlooked beside its mean."""
    notes = []
    if row["failures"]:
        notes.append(f"{row['failures']} failed")
    if pd.notna(row["chance_seeds"]) and row["chance_seeds"]:
        notes.append(f"{row['chance_seeds']} of {row['n_seeds']} at chance")
    return f"{row['name']} ({', '.join(notes)})" if notes else row["name"]


def _legend() -> list[Any]:
    plain: dict[str, Any] = {"color": "black", "marker": "o", "linestyle": "none", "markersize": 5}
    return [
        Line2D([], [], color="black", marker="o", markersize=5, linewidth=1, label="ours, 95 % of the test set"),
        Patch(color="0.6", label="95 % over seeds"),
        Line2D([], [], **plain, markerfacecolor="white", label="published"),
        Line2D([], [], color=QUIET, linestyle="--", linewidth=0.8, label="class prior"),
    ]
