"""A map of what the places of Pathfinder's markers tell: with one in the middle, how often label 1 lies where."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lra.audit.images import Images
from lra.figures.style import SIZES, save, style

NEAR = 0.08
"""A marker so many sides from the middle of the image, or less, lies in the middle."""

CELLS = 11
"""Of the map, along each side."""

ENOUGH = 10
"""Images that a cell of the map needs."""


def share_of_ones(images: Images) -> tuple[np.ndarray, int]:
    """(CELLS, CELLS): the share of label 1 by the place (y, x) of the other marker; of how many images it is.

    Of images with a marker in the middle; NaN where too few have the other one.
    """
    assert images.markers is not None
    side = images.pixels.shape[-1]
    distances = np.hypot(*np.moveaxis(images.markers - (side - 1) / 2, -1, 0))
    chosen = distances.min(1) <= NEAR * side
    other = images.markers[np.arange(len(distances)), distances.argmax(1)][chosen]
    labels = images.labels[chosen]
    edges = np.linspace(-0.5, side - 0.5, CELLS + 1)
    counts, ones = (np.histogram2d(*other[which].T, bins=[edges, edges])[0] for which in (slice(None), labels))
    return np.divide(ones, counts, out=np.full_like(ones, np.nan), where=counts >= ENOUGH), int(chosen.sum())


def draw(path: Path, title: str, images: Images) -> None:
    """Write `path`.png and `path`.svg."""
    shares, count = share_of_ones(images)
    side = images.pixels.shape[-1]
    with style():
        figure = Figure(figsize=(3.8, 3.3), layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        drawn = axes.imshow(shares, cmap="PuOr", vmin=0, vmax=1, extent=(-0.5, side - 0.5, side - 0.5, -0.5))
        axes.plot((side - 1) / 2, (side - 1) / 2, "k+", markersize=9)
        axes.set(xlabel="the other marker, pixels from the left", ylabel="from the top")
        figure.colorbar(drawn, label="share of label 1", shrink=0.9)
        figure.suptitle(f"{title}: one marker in the middle\n{count:,} images", fontsize=SIZES["title"])
        save(figure, path)
