"""The lens as a picture: attention matrices side by side, and the curves against temperature."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from lra.figures.style import Look, looks, save, style

CURVES = (
    ("entropy", "entropy (bits)", "linear"),
    ("spectral_gap", "spectral gap 1 − |λ₂|", "linear"),
    ("log_variance", "var(ln P)", "log"),
    ("relative_error", "error against softmax", "linear"),
)
"""Instrument, axis label and scale of each panel."""

CONTRAST = (2.0, 100.0)
"""The colours span uniform attention divided and multiplied by a factor in this range that shows 99 % of weights."""

RESOLUTION = 256
"""A longer matrix is drawn with its weights averaged to this many cells a side."""

PANELS_PER_ROW = 6


class Panel(NamedTuple):
    """One matrix of the picture: whose it is, what the instruments say, (a part of) P, the weight 1/N."""

    title: str
    note: str
    matrix: Tensor
    uniform: float


def draw(path: Path, title: str, panels: Sequence[Panel], curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write `path`.png and `path`.svg, the same bytes for the same numbers.

    panels   matrices, drawn in rows of PANELS_PER_ROW under one colour scale of N · P_ij (1 = uniform)
    curves   attention to its points along a sweep, each with `softmax_temperature` and the instruments of CURVES
    """
    columns = min(PANELS_PER_ROW, len(panels))
    rows = -(-len(panels) // columns)
    legend_columns = max(4, columns)
    heights = [2.15 * rows, 2.4 + 0.2 * -(-len(curves) // legend_columns)]
    with style():
        figure = Figure(figsize=(max(8.8, 2.05 * columns + 0.6), sum(heights) + 0.4), layout="constrained")
        figure.suptitle(title, fontsize=9)
        parts: Any = figure.subfigures(2, 1, height_ratios=heights)
        upper, lower = parts
        _draw_matrices(upper, panels, rows, columns)
        _draw_curves(lower, curves, legend_columns)
        save(figure, path)


def _draw_matrices(figure: Any, panels: Sequence[Panel], rows: int, columns: int) -> None:
    grid = figure.subplots(rows, columns, squeeze=False)
    norm = _common_scale(panels)
    colours = mpl.colormaps["cividis"].with_extremes(bad="white")
    image = None
    for axes, panel in zip(grid.flat, panels, strict=False):
        length = panel.matrix.shape[-1]
        relative = np.ma.masked_less_equal(_relative(panel), 0)
        image = axes.imshow(relative, cmap=colours, norm=norm, interpolation="nearest", extent=(0, length, length, 0))
        axes.set_title(f"{panel.title}\n{panel.note}", linespacing=1.4)
        axes.set_xticks([0, length])
        axes.set_yticks([0, length])
        axes.tick_params(length=2, labelsize=7)
        axes.spines[["top", "right"]].set_visible(True)
        axes.grid(visible=False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("query")
    for axes in grid.flat:
        axes.set_xlabel("key", labelpad=-6)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, extend="both", shrink=0.9, pad=0.01, aspect=30)
        bar.set_label("N · P (1: uniform; white: 0 or negative)")


def _common_scale(panels: Sequence[Panel]) -> LogNorm:
    """One scale for all panels, centred on uniform attention."""
    logs = [np.log(weights[weights > 0]) for weights in (_relative(panel) for panel in panels)]
    contrast = max((np.exp(np.quantile(np.abs(one), 0.99)) for one in logs if one.size), default=1.0)
    contrast = float(np.clip(contrast, *CONTRAST))
    return LogNorm(1 / contrast, contrast)


def _relative(panel: Panel) -> np.ndarray:
    """N · P, pooled: 1 where attention is uniform."""
    return pooled(panel.matrix).cpu().numpy() / panel.uniform


def pooled(matrix: Tensor) -> Tensor:
    """P averaged over cells, so that it has at most RESOLUTION of them a side."""
    if matrix.shape[-1] <= RESOLUTION:
        return matrix
    return functional.adaptive_avg_pool2d(matrix[None], RESOLUTION)[0]


def _draw_curves(figure: Any, curves: Mapping[str, Sequence[Mapping[str, Any]]], columns: int) -> None:
    known = looks(curves)
    for axes, (instrument, label, scale) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for name, points in curves.items():
            _draw_curve(axes, known[name], name, points, instrument)
        axes.set_xscale("log", base=2)
        if any(point[instrument] > 0 for points in curves.values() for point in points):  # else no logarithm
            axes.set_yscale(scale)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("softmax temperature")
        axes.set_title(label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)


def _draw_curve(axes: Axes, look: Look, name: str, points: Sequence[Mapping[str, Any]], instrument: str) -> None:
    axes.plot(
        [point["softmax_temperature"] for point in points],
        [point[instrument] for point in points],
        label=name,
        **look.line(),
    )
