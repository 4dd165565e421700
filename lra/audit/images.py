"""Images, labels and markers of a prepared Pathfinder, as the audits read them."""

from typing import NamedTuple

import numpy as np

from lra.errors import UserError
from lra.tasks import Split, TaskData
from lra.tasks.pathfinder import Pathfinder


class Images(NamedTuple):
    """The first images of a split.

    pixels    (n, side, side) uint8 grey
    labels    (n,) bool: both markers lie on one contour
    markers   (n, 2, 2): the pixels (y, x) of the two markers; None where nobody knows them (the official images)
    """

    pixels: np.ndarray
    labels: np.ndarray
    markers: np.ndarray | None


def first(task: Pathfinder, data: TaskData, split: str, count: int) -> Images:
    """The first `count` images of a split of `task`, as `task.prepare` gave `data`, or all where there are fewer."""
    part = Split(*(array[:count] for array in data.splits[split]))
    pixels, labels = grey(task, part.tokens), part.labels.astype(bool)
    markers = drawn_markers(task, split, pixels, labels) if data.source == "generate" else None
    return Images(pixels, labels, markers)


def grey(task: Pathfinder, tokens: np.ndarray) -> np.ndarray:
    """Tokens (n, side²) back to images (n, side, side) uint8."""
    return (tokens - (task.black == "pixel")).astype(np.uint8).reshape(-1, task.resolution, task.resolution)


def drawn_markers(task: Pathfinder, split: str, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The markers (n, 2, 2) of the first images of a split, drawn once more.

    UserError unless pixels and labels are those of the drawings, and each label is true: 1 where the two marked tips
    are those of one contour.
    """
    markers = np.empty((len(labels), 2, 2), np.int64)
    for rows, drawn in task.draw_rows(split, len(labels)):
        contours, ends = drawn.marked[..., 0], drawn.marked[..., 1]
        wrong = (labels[rows] != (contours[:, 0] == contours[:, 1])) | (pixels[rows] != drawn.image).any((1, 2))
        if wrong.any():
            number = rows.start + int(wrong.argmax())
            raise UserError(f"{task.name}: image {number} of {split} is not the one that is drawn under this number")
        markers[rows] = drawn.tips[np.arange(len(wrong))[:, None], contours, ends]
    return markers
