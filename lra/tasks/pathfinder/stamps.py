"""Everything that a Pathfinder image is put together from, drawn once: paddles, the zones they occupy, markers.

A paddle is a straight line from an anchor pixel, drawn at twice the resolution and reduced with a Lanczos filter. At
that resolution its far end is an offset of whole pixels, so that few different paddles exist.

Sines are rounded to multiples of 2⁻³⁰ and pixel values to multiples of 1/255, so that no library's last bit matters.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from lra.tasks.pathfinder.style import STYLES

SCALE = 2
"""Lines are drawn at this multiple of the resolution."""

LOBES = 3
"""Of the Lanczos filter."""

TURN_SAMPLES = 4096

LIMIT = 1.8
"""No pixel may be occupied by more than this when the zone of a new paddle is added."""

INK, ZONE, HALO = range(3)
"""The pictures of a paddle."""


class Stamps(NamedTuple):
    """All that the generator draws with, for one resolution and margin; pictures have their anchor in the middle.

    lookup     (2R + 1, 2R + 1): paddle whose far end is (y − R, x − R), in pixels of the drawing; −1 if none is
    paddles    (paddles, 3, P, P): ink, the line itself; zone, the line widened by the margin, which it occupies;
               halo, the zone widened by the margin, where the end of another paddle is unwelcome
    boxes      (paddles, 2, 4): first row, last row + 1, first column, last column + 1 of the pixels of its zone that
               can reach LIMIT with another's; of all pixels of its halo
    marker     (P, P)
    empty      (2, W + P − 1, W + P − 1): zone and halo of the frame of an empty image; half a stamp lies around it
    arc        (n, 2) unit vectors, as many as the circle of candidates has pixels
    compass    (360, 2) unit vectors of whole degrees
    turn       weight of a turn by the angle with cosine −1 … 1, sampled evenly
    """

    lookup: np.ndarray
    paddles: np.ndarray
    boxes: np.ndarray
    marker: np.ndarray
    empty: np.ndarray
    arc: np.ndarray
    compass: np.ndarray
    turn: np.ndarray


@cache
def stamps(window: int, margin: int) -> Stamps:
    """The stamps of a resolution with one of its margins."""
    style = STYLES[window]
    length, reach = SCALE * style.paddle_length, style.paddle_length + margin
    side = 2 * (reach + margin + LOBES) + 1  # of a picture: no pixel above zero lies outside
    lookup = np.full((2 * length + 3, 2 * length + 3), -1, np.int64)
    ends = far_ends(length)
    paddles = np.empty((len(ends), 3, side, side), np.float32)
    for paddle, (y, x) in enumerate(ends):
        lookup[y + length + 1, x + length + 1] = paddle
        line = draw_line(y, x, round(style.thickness * SCALE), SCALE * side)
        zone = shrink(widen(line, margin * SCALE))
        paddles[paddle] = shrink(line), zone, widen(zone, margin)
    boxes = np.stack([bounds(paddles[:, ZONE] >= LIMIT - 1), bounds(paddles[:, HALO] > 0)], axis=1)
    turns = np.arccos(np.linspace(-1, 1, TURN_SAMPLES + 1))
    return Stamps(
        lookup,
        paddles,
        boxes,
        marker=shrink(widen(draw_line(0, 0, 1, SCALE * side), SCALE * style.marker_radius)).astype(
            np.float32, order="C"
        ),
        empty=np.stack([frame(window, side // 2, style.padding + widened) for widened in (0, margin)]),
        arc=unit_vectors(int(np.ceil(2 * np.pi * reach))),
        compass=unit_vectors(360),
        turn=rounded(np.cos(np.minimum(style.continuity * turns, np.pi / 2)) ** 2),
    )


def bounds(pictures: np.ndarray) -> np.ndarray:
    """(n, 4): the smallest box around the true pixels of each picture."""
    lines = np.any(pictures, axis=2), np.any(pictures, axis=1)
    ends = [(line.argmax(1), line.shape[1] - np.flip(line, 1).argmax(1)) for line in lines]
    return np.stack([end for pair in ends for end in pair], axis=1)


def frame(window: int, border: int, width: int) -> np.ndarray:
    """1 on the border and on a frame of this width inside it, else 0."""
    picture = np.ones((window + 2 * border, window + 2 * border), np.float32)
    picture[border + width : -border - width, border + width : -border - width] = 0
    return picture


def far_ends(length: int) -> list[tuple[int, int]]:
    """All pixels that a vector of this length can end in: their squares meet the circle."""
    places = [(y, x) for y in range(-length - 1, length + 2) for x in range(-length - 1, length + 2)]
    near, far = (lambda y, x, s=s: np.hypot(max(abs(y) + s, 0), max(abs(x) + s, 0)) for s in (-0.5, 0.5))
    return [place for place in places if near(*place) <= length <= far(*place)]


def unit_vectors(count: int) -> np.ndarray:
    """(count, 2): sine and cosine of equally spaced angles."""
    angles = np.arange(count) * (2 * np.pi / count)
    return rounded(np.stack([np.sin(angles), np.cos(angles)], axis=1))


def rounded(values: np.ndarray) -> np.ndarray:
    return np.ldexp(np.rint(np.ldexp(values, 30)), -30)


def draw_line(y: int, x: int, width: int, side: int) -> np.ndarray:
    """A picture (side, side) with 1 where a line of this width from its middle to (y, x) lies."""
    row, column = (axis - (side - SCALE) // 2 for axis in np.ogrid[:side, :side])
    along, across, square = row * y + column * x, row * x - column * y, y * y + x * x
    if square == 0:
        return ((row == 0) & (column == 0)).astype(np.float64)
    spread = max(abs(y), abs(x)) if width == 1 else width * np.sqrt(square)  # the first: one pixel a step
    return ((along >= 0) & (along <= square) & (-spread < 2 * across) & (2 * across <= spread)).astype(np.float64)


def widen(picture: np.ndarray, radius: float) -> np.ndarray:
    """Grey dilation with a disc: the largest value within `radius` of each pixel."""
    reach = int(radius)
    offsets = [(y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    shifted = [np.roll(picture, offset, (0, 1)) for offset in offsets if offset[0] ** 2 + offset[1] ** 2 <= radius**2]
    return np.max(shifted, axis=0)


def shrink(picture: np.ndarray) -> np.ndarray:
    """A drawing at the image's resolution: Lanczos filter along x, then y, each cut to 0 … 1 and rounded to 1/255."""
    side = len(picture)
    drawn, pixel = (np.arange(n) + 0.5 for n in (side, side // SCALE))
    distance = (drawn[None] - SCALE * pixel[:, None]) / SCALE
    kernel = np.where(np.abs(distance) < LOBES, np.sinc(distance) * np.sinc(distance / LOBES), 0)
    kernel /= kernel.sum(1, keepdims=True)
    for _ in range(2):
        picture = np.rint(255 * np.clip(picture @ kernel.T, 0, 1)).T / 255
    return picture
