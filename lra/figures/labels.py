"""Names beside curves and marks, where they hide neither each other nor the data; the same places every time."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lra.figures.style import QUIET

SIZE = 6.5
LINE = 1.25 * SIZE
"""From one line of text to the next, in points."""

BESIDE = 14.0
"""Between the axes and the names of its curves, in points."""

ANGLES = tuple(math.radians(degrees) for degrees in (0, 45, -45, 90, -90, 135, -135, 180))
DISTANCES = (2.0, 10.0, 20.0, 32.0, 46.0)
"""Where a name beside a mark may stand: directions, and points beyond the mark's edge, the best first."""


class Label(NamedTuple):
    """A name for the point (x, y) of the data, whose mark has this radius in points."""

    x: float
    y: float
    text: str
    colour: str
    radius: float = 3.0


def label_ends(figure: Figure, labels: Sequence[tuple[Axes, Sequence[Label]]]) -> None:
    """Write the names of curves to the right of their axes, each as near to its curve's end as the others allow.

    Every (axes, names) of a figure in one call, after everything else is drawn; it ends the figure's layout.
    """
    written = [(axes, label, _outside(axes, label)) for axes, names in labels for label in sorted(names)]
    figure.draw_without_rendering()  # the layout makes room for the names
    figure.set_layout_engine("none")
    for axes, _ in labels:
        mine = [(label, text) for each, label, text in written if each is axes]
        bottom, top = axes.bbox.y0, axes.bbox.y1
        wanted = [min(max(_pixels(axes, label)[1], bottom), top) for label, _ in mine]
        for (label, text), y in zip(mine, spread(wanted, LINE * figure.dpi / 72, bottom, top), strict=True):
            at = (y - bottom) / (top - bottom)
            text.xy = (1, at)
            axes.annotate(
                "", (label.x, label.y), xytext=(1 + BESIDE * figure.dpi / 72 / axes.bbox.width, at),
                textcoords="axes fraction", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2},
            )  # fmt: skip


def _outside(axes: Axes, label: Label) -> Any:
    return axes.annotate(
        label.text, (1, 0.5), xycoords="axes fraction", xytext=(BESIDE + 2, 0), textcoords="offset points",
        color=label.colour, fontsize=SIZE, va="center_baseline", annotation_clip=False,
    )  # fmt: skip


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in low … high, at least `gap` apart, in the order of `wanted` and nearest to it by least squares.

    Where they do not fit, the gap shrinks. With p_i = u_i + i · gap the u are the isotonic regression of w_i − i · gap,
    found by pooling neighbours that are out of order.
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    pools: list[list[float]] = []  # [sum, count]
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    levels = itertools.chain.from_iterable([total / count] * int(count) for total, count in pools)
    top = high - (len(order) - 1) * gap
    places = [0.0] * len(order)
    for rank, (i, level) in enumerate(zip(order, levels, strict=True)):
        places[i] = min(max(level, low), top) + rank * gap
    return places


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)


def label_marks(figure: Figure, labels: Sequence[tuple[Axes, Sequence[Label]]]) -> None:
    """Write the names of marks beside them, clear of other marks and names, with a leader line where they stand off.

    Every (axes, names) of a figure in one call, after everything else is drawn; it ends the figure's layout.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, names in labels:
        _label_marks(figure, axes, sorted(names, key=lambda label: (-label.y, label.x, label.text)))


def _label_marks(figure: Figure, axes: Axes, names: Sequence[Label]) -> None:
    scale = figure.dpi / 72
    centres = [_pixels(axes, label) for label in names]
    marks = [_around(centre, label.radius * scale) for centre, label in zip(centres, names, strict=True)]
    frame = Box(axes.bbox.x0, axes.bbox.y0, axes.bbox.x1, axes.bbox.y1)
    written: list[Box] = []
    for own, (label, centre) in enumerate(zip(names, centres, strict=True)):
        text = axes.annotate(
            label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points", fontsize=SIZE,
            color=label.colour, ha="center", va="center", annotation_clip=False,
        )  # fmt: skip
        extent = text.get_window_extent()
        size = (extent.width / 2 + 1.0, extent.height / 2 + 1.0)
        others = [mark for at, mark in enumerate(marks) if at != own]

        def cost(candidate: tuple[float, float], size=size, centre=centre, others=others, own=own) -> float:
            box = _at(centre, candidate, size, scale)
            hidden = sum(map(box.overlap, written)) * 4 + sum(map(box.overlap, others)) + box.overlap(marks[own])
            outside = 4 * size[0] * size[1] - box.overlap(frame)
            crossed = sum(_inside(point, [*written, *others]) for point in _between(centre, candidate, scale))
            return hidden + 2 * outside + 20 * crossed + 0.5 * math.hypot(*candidate)

        best = min(_candidates(label.radius, size, scale), key=cost)
        written.append(_at(centre, best, size, scale))
        text.set_position(best)
        _leader(axes, label, best, size, scale)


def _between(centre: tuple[float, float], offset: tuple[float, float], scale: float) -> list[tuple[float, float]]:
    """Points on the way from a mark to its name, in pixels."""
    return [(centre[0] + part / 8 * offset[0] * scale, centre[1] + part / 8 * offset[1] * scale) for part in range(8)]


def _inside(point: tuple[float, float], boxes: Sequence[Box]) -> bool:
    return any(box.left < point[0] < box.right and box.bottom < point[1] < box.top for box in boxes)


def _candidates(radius: float, size: tuple[float, float], scale: float) -> list[tuple[float, float]]:
    """Offsets of a name's middle from a mark's, in points: its near edge is DISTANCES beyond the mark."""
    half_width, half_height = size[0] / scale, size[1] / scale
    return [
        ((radius + beyond + half_width) * math.cos(angle), (radius + beyond + half_height) * math.sin(angle))
        for beyond in DISTANCES
        for angle in ANGLES
    ]


def _leader(axes: Axes, label: Label, offset: tuple[float, float], size: tuple[float, float], scale: float) -> None:
    """A thin line from a mark to a name that does not stand right beside it."""
    reach_x = max(0.0, abs(offset[0]) - size[0] / scale)
    reach_y = max(0.0, abs(offset[1]) - size[1] / scale)
    if math.hypot(reach_x, reach_y) <= label.radius + 1.5 * DISTANCES[0] + 1:
        return
    end = (math.copysign(reach_x, offset[0]), math.copysign(reach_y, offset[1]))
    axes.annotate(
        "", (label.x, label.y), xytext=end, textcoords="offset points", annotation_clip=False,
        arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.4, "shrinkA": 0, "shrinkB": label.radius},
    )  # fmt: skip


def _at(centre: tuple[float, float], offset: tuple[float, float], size: tuple[float, float], scale: float) -> Box:
    x, y = centre[0] + offset[0] * scale, centre[1] + offset[1] * scale
    return Box(x - size[0], y - size[1], x + size[0], y + size[1])


def _around(centre: tuple[float, float], radius: float) -> Box:
    reach = 0.9 * radius  # a disc leaves the corners of its square free
    return Box(centre[0] - reach, centre[1] - reach, centre[0] + reach, centre[1] + reach)


def _pixels(axes: Axes, label: Label) -> tuple[float, float]:
    x, y = axes.transData.transform((label.x, label.y))
    return float(x), float(y)
