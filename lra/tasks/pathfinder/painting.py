"""Pathfinder's picture of what was drawn, and its turning. Compiled; arguments as in `generator`."""

import numpy as np
from numba import njit

from lra.tasks.pathfinder.stamps import INK


@njit(nogil=True)
def paint(kit, black, contrasts, chains, distractors, tips, marked, image, owner):
    """Fills image and owner, see `Drawing`."""
    ink = np.zeros((4, *kit.empty.shape[1:]))  # of the contours, the distractors, the markers
    for contour in range(2):
        for paddle in chains[contour]:
            lay(kit.paddles[paddle[0], INK], paddle[1], paddle[2], contrasts[contour], ink[contour])
        tip = tips[marked[contour, 0], marked[contour, 1]]
        lay(kit.marker, tip[0], tip[1], np.float32(1), ink[3])
    for paddle in distractors:
        lay(kit.paddles[paddle[0], INK], paddle[1], paddle[2], contrasts[2], ink[2])
    border, brightest = len(kit.marker) // 2, 0.0
    for exposing in range(2):
        for y in range(len(image)):
            for x in range(len(image)):
                most, whose = 0.0, 0
                for layer in range(3):
                    if ink[layer, border + y, border + x] > most:
                        most, whose = ink[layer, border + y, border + x], layer + 1
                most = max(most, ink[3, border + y, border + x])
                if exposing:
                    value = np.floor(255 * (most / brightest) + 0.5)
                    image[y, x], owner[y, x] = 0 if value < black else value, whose
                brightest = max(brightest, most)


@njit(nogil=True)
def turn(way, picture):
    """Mirror a square picture in its main diagonal, its middle row and its middle column, as the bits of `way` say."""
    before = picture.copy()
    for y in range(len(before)):
        for x in range(len(before)):
            to_y, to_x = turned(way, len(before), y, x)
            picture[to_y, to_x] = before[y, x]


@njit(nogil=True)
def turn_places(way, window, places):
    """The same for places (n, 2) in it."""
    for place in places:
        place[0], place[1] = turned(way, window, place[0], place[1])


@njit(nogil=True)
def turned(way, window, y, x):
    if way & 1:
        y, x = x, y
    if way & 2:
        y = window - 1 - y
    if way & 4:
        x = window - 1 - x
    return y, x


@njit(nogil=True)
def lay(stamp, y, x, contrast, picture):
    """picture = max(picture, contrast · stamp with its anchor at (y, x)); pictures have a border of half a stamp."""
    for row in range(len(stamp)):
        for column in range(len(stamp)):
            picture[y + row, x + column] = max(picture[y + row, x + column], contrast * stamp[row, column])
