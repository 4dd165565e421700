"""Everything that a Pathfinder image is put together from, drawn once: paddles, the zones they occupy, markers.

A paddle is a straight line from an anchor pixel, drawn at twice the resolution and reduced with a Lanczos filter. At
that resolution its far end is an offset of whole pixels, so that few different paddles exist. Where the published code
rounds in a way of its own, `rules` tells which is meant, see `lra.tasks.pathfinder.generator`.

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

LIMIT = {"even": 1.8, "published": 1.8 - 1e-3}
"""Pixels must be occupied by less than this when the zone of a new paddle is added, all multiples of 1/255: the first
lets 459/255 pass, since it meets 32-bit sums, the second does not."""

FREE = {"even": 1e-3, "published": 0.3}
"""A pixel occupied by more than this is not free for the first paddle of a contour."""

INK, ZONE, HALO, FOOTPRINT = range(4)
"""The pictures of a paddle."""


class Stamps(NamedTuple):
    """All that the generator draws with, for one resolution and margin; pictures have their anchor in the middle.

    lookup     (2R + 1, 2R + 1): paddle whose far end is (y − R, x − R), in pixels of the drawing; −1 if none is
    paddles    (paddles, 4, P, P): ink, the line itself; zone, the line widened by the margin, which it occupies;
               halo, the zone widened by the margin, where the end of another paddle is unwelcome; footprint, 1 where
               it needs free pixels to be the first of a contour
    boxes      (paddles, 3, 4): first row, last row + 1, first column, last column + 1 of the pixels of its zone that
               can reach LIMIT with another's; of all pixels of its halo; of its footprint
    starts     (paddles,) bool: it can be the first of a contour that looks for a place
    marker     (P, P)
    empty      (2, W + P − 1, W + P − 1): zone and halo of the frame of an empty image; half a stamp lies around it
    middle     (W + P − 1, W + P − 1): 0 where the first contour may begin, else 1
    arc        (n, 2) unit vectors, as many as the circle of candidates has pixels
    compass    (360, 2) unit vectors of whole degrees
    turn       weight of a turn by the angle with cosine −1 … 1, sampled evenly
    """

    lookup: np.ndarray
    paddles: np.ndarray
    boxes: np.ndarray
    starts: np.ndarray
    marker: np.ndarray
    empty: np.ndarray
    middle: np.ndarray
    arc: np.ndarray
    compass: np.ndarray
    turn: np.ndarray


@cache
def stamps(window: int, margin: int, rules: str) -> Stamps:
    """The stamps of a resolution with one of its margins, by the rules "published" or "even"."""
    style, published = STYLES[window], rules == "published"
    length, reach = SCALE * style.paddle_length, style.paddle_length + margin
    side = 2 * (reach + margin + LOBES) + 1  # of a picture: no pixel above zero lies outside
    extent = 2 * (reach + int(np.ceil(style.thickness))) + 1 if published else side  # the first cuts tails off
    width = round(style.thickness * SCALE)
    lookup = np.full((2 * length + 3, 2 * length + 3), -1, np.int64)
    ends = far_ends(length, published)
    paddles, starts = np.empty((len(ends), 4, side, side), np.float32), np.empty(len(ends), bool)
    for paddle, (y, x) in enumerate(ends):
        lookup[y + length + 1, x + length + 1] = paddle
        if published:
            place = SCALE * (extent - 1) + 1, SCALE * (extent // 2)
            line = draw_pixels(y, x, *place) if width == 1 else draw_line(y, x, width, *place)
        else:
            line = draw_line(y, x, width, SCALE * side, SCALE * (side // 2))
        drawn = shrink(np.stack([line, widen(line, margin * SCALE)]), extent)
        ink, zone = np.pad(drawn, [(0, 0), *[((side - extent) // 2,) * 2] * 2])
        footprint, starts[paddle] = published_footprint(zone, reach) if published else (zone > 0, True)
        paddles[paddle] = ink, zone, widen(zone, margin), footprint
    needed = paddles[:, ZONE] >= LIMIT[rules] - 1, paddles[:, HALO] > 0, paddles[:, FOOTPRINT] > 0
    turns = np.arccos(np.linspace(-1, 1, TURN_SAMPLES + 1))
    point = draw_line(0, 0, 1, SCALE * side, SCALE * (side // 2))
    pixels = int(np.ceil(2 * np.pi * reach))
    return Stamps(
        lookup,
        paddles,
        np.stack([bounds(picture) for picture in needed], axis=1),
        starts,
        marker=shrink(widen(point, SCALE * style.marker_radius), side).astype(np.float32, order="C"),
        empty=np.stack([frame(window, side // 2, style.padding + widened) for widened in (0, margin)]),
        middle=frame(window, side // 2, 2 * style.seed_distance),
        arc=unit_vectors(pixels, 1 / reach if published else 2 * np.pi / pixels),
        compass=unit_vectors(360, 2 * np.pi / 360),
        turn=rounded(np.cos(np.minimum(style.continuity * turns, np.pi / 2)) ** 2),
    )


def published_footprint(zone: np.ndarray, reach: int) -> tuple[np.ndarray, bool]:
    """What the published code takes for a paddle's footprint, and whether it finds a place for it at all.

    It dilates what is occupied by the pixels of the zone that are exactly 1, drawn from one pixel below and right of
    the kernel's middle and cut where the kernel ends. Where the dilation's kernel misses the image, OpenCV writes the
    least number there is, upon which the code finds no place anywhere: that happens at some corner of the image
    unless the footprint has pixels in all four quadrants around the kernel's middle.
    """
    middle, footprint = len(zone) // 2, np.zeros_like(zone)
    kernel = slice(middle - reach, middle + reach + 1)
    footprint[kernel, kernel] = np.roll(zone == 1, (1, 1), (0, 1))[kernel, kernel]
    halves = slice(None, middle + 1), slice(middle, None)
    return footprint, all(footprint[rows, columns].any() for rows in halves for columns in halves)


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


def far_ends(length: int, up: bool) -> list[tuple[int, int]]:
    """All pixels that a vector of this length can end in, rounded up or to nearest: their squares meet the circle."""
    places = [(y, x) for y in range(-length - 1, length + 2) for x in range(-length - 1, length + 2)]
    low, high = (-1, 0) if up else (-0.5, 0.5)

    def spans(axis: int) -> tuple[float, float]:
        """The least and the largest distance from 0 in this row or column."""
        return max(axis + low, -axis - high, 0), max(abs(axis + low), abs(axis + high))

    near, far = (lambda y, x, end=end: np.hypot(spans(y)[end], spans(x)[end]) for end in (0, 1))
    return [place for place in places if near(*place) <= length <= far(*place)]


def unit_vectors(count: int, step: float) -> np.ndarray:
    """(count, 2): sine and cosine of angles from 0 on, `step` apart."""
    angles = np.arange(count) * step
    return rounded(np.stack([np.sin(angles), np.cos(angles)], axis=1))


def rounded(values: np.ndarray) -> np.ndarray:
    return np.ldexp(np.rint(np.ldexp(values, 30)), -30)


def draw_line(y: int, x: int, width: int, side: int, middle: int) -> np.ndarray:
    """A picture (side, side) with 1 where a line of this width from its middle to (y, x) lies."""
    row, column = (axis - middle for axis in np.ogrid[:side, :side])
    along, across, square = row * y + column * x, row * x - column * y, y * y + x * x
    if square == 0:
        return ((row == 0) & (column == 0)).astype(np.float64)
    spread = max(abs(y), abs(x)) if width == 1 else width * np.sqrt(square)  # the first: one pixel a step
    return ((along >= 0) & (along <= square) & (-spread < 2 * across) & (2 * across <= spread)).astype(np.float64)


def draw_pixels(y: int, x: int, side: int, middle: int) -> np.ndarray:
    """The same, one pixel wide, where half a step is rounded away from the middle, as Bresenham's algorithm does it."""
    steps, picture = max(abs(y), abs(x)), np.zeros((side, side))
    row, column = (np.sign(end) * ((2 * np.arange(steps + 1) * abs(end) + steps) // (2 * steps)) for end in (y, x))
    picture[middle + row, middle + column] = 1
    return picture


def widen(picture: np.ndarray, radius: float) -> np.ndarray:
    """Grey dilation with a disc: the largest value within `radius` of each pixel."""
    reach = int(radius)
    offsets = [(y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    shifted = [np.roll(picture, offset, (0, 1)) for offset in offsets if offset[0] ** 2 + offset[1] ** 2 <= radius**2]
    return np.max(shifted, axis=0)


def shrink(pictures: np.ndarray, side: int) -> np.ndarray:
    """Drawings (…, n, n) at the resolution of images: Lanczos along x, then y, each cut to 0 … 1, rounded to 1/255."""
    drawn, pixel = (np.arange(n) + 0.5 for n in (pictures.shape[-1], side))
    ratio = pictures.shape[-1] / side
    distance = (drawn[None] - ratio * pixel[:, None]) / ratio
    kernel = np.where(np.abs(distance) < LOBES, np.sinc(distance) * np.sinc(distance / LOBES), 0)
    kernel /= kernel.sum(1, keepdims=True)
    for _ in range(2):
        pictures = (np.rint(255 * np.clip(pictures @ kernel.T, 0, 1)) / 255).swapaxes(-1, -2)
    return pictures
