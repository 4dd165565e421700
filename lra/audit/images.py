"""Images, labels, markers and ends of contours of a prepared Pathfinder, as the audits read them."""

from typing import NamedTuple

import numpy as np

from lra.errors import UserError
from lra.tasks import Split, TaskData
from lra.tasks.pathfinder import Pathfinder

ENDS_SEEN = 4
"""Dashes of each end that `Images.ends` holds."""


class Images(NamedTuple):
    """The first images of a split.

    pixels    (n, side, side) uint8 grey
    labels    (n,) bool: both markers lie on one contour
    markers   (n, 2, 2): the pixels (y, x) of the two markers; None where nobody knows them (the official images)
    ends      (n, 3, ENDS_SEEN, 2): where (y, x) the dashes lie, counted from the tip, of the marked beginning of a
              contour, of the other contour's beginning, and of the marked end; None as above
    """

    pixels: np.ndarray
    labels: np.ndarray
    markers: np.ndarray | None
    ends: np.ndarray | None = None


def first(task: Pathfinder, data: TaskData, split: str, count: int) -> Images:
    """The first `count` images of a split of `task`, as `task.prepare` gave `data`, or all where there are fewer."""
    part = Split(*(array[:count] for array in data.splits[split]))
    pixels, labels = grey(task, part.tokens), part.labels.astype(bool)
    drawn = redraw(task, split, pixels, labels) if data.source == "generate" else (None, None)
    return Images(pixels, labels, *drawn)


def grey(task: Pathfinder, tokens: np.ndarray) -> np.ndarray:
    """Tokens (n, side²) back to images (n, side, side) uint8."""
    return (tokens - (task.black == "pixel")).astype(np.uint8).reshape(-1, task.resolution, task.resolution)


def redraw(task: Pathfinder, split: str, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Markers and ends of the first images of a split, drawn once more.

    UserError unless pixels and labels are those of the drawings, and each label is true: 1 where the two marked tips
    are those of one contour.
    """
    markers = np.empty((len(labels), 2, 2), np.int64)
    ends = np.empty((len(labels), 3, ENDS_SEEN, 2), np.int64)
    for rows, drawn in task.draw_rows(split, len(labels)):
        contours, tips = drawn.marked[..., 0], drawn.marked[..., 1]
        wrong = (labels[rows] != (contours[:, 0] == contours[:, 1])) | (pixels[rows] != drawn.image).any((1, 2))
        if wrong.any():
            number = rows.start + int(wrong.argmax())
            raise UserError(f"{task.name}: image {number} of {split} is not the one that is drawn under this number")
        each, (begun, ended) = np.arange(len(wrong)), contours.T  # the first marker lies where a contour begins
        markers[rows] = drawn.tips[each[:, None], contours, tips]
        dashes = drawn.paddles[..., 1:]  # without the stamps
        ends[rows, 0] = dashes[each, begun, :ENDS_SEEN]
        ends[rows, 1] = dashes[each, 1 - begun, :ENDS_SEEN]
        ends[rows, 2] = dashes[each, ended, : -ENDS_SEEN - 1 : -1]
    return markers, ends
