"""Random Pathfinder images: compiled, parallel, the same for any number of workers and on every machine.

Two contours of paddles wander from near the middle of the image, among shorter distractors. Two markers lie on tips:
on both tips of one contour (label 1), or on one tip of each (label 0). Written from the description of the benchmark's
generator (Linsley et al. 2018; Tay et al. 2020), the published rules below after what its code was seen to do:

contour    paddle after paddle, from a pivot behind each: the next pivot lies L + 2m ahead of the last; the paddle ends
           on a pixel of the circle of radius L + m around it, chosen with probability ∝ cos²(c·turn) · (1 − halo),
           and is kept if no pixel of its zone is then occupied by LIMIT or more (three choices)
pair       the contours grow in turn; if one cannot go on, both start anew
distractors, markers, and a stretch of the grey values to 0 … 255 follow.

There are three drawings, by two sets of rules. Images of all have the same parameters and the same kind of task; the
rules differ in what the published code (`drewlinsley/pathfinder` at ab9c130) does unsaid:

                     published                                   even
rounding             pivots and far ends of paddles up,          far ends of paddles and candidates to the nearest,
                     candidates down                             pivots not at all
first contour        begins where that code finds a place: at    begins anywhere in the middle, in any direction
                     32 × 32 pixels in a twelfth of all
                     directions, up and left
                     (`published_footprint`)
a contour sees       all paddles but the last of each            all but its own last one, so that tips never cross
distractors          begin as the first contour does; one that   begin anywhere in any direction; what the last of
                     does not reach its length is dropped        five attempts reaches is kept
black                what is 0                                   what is darker than 3, so that two thirds are 0

By the published rules the two contours of an image of 32 × 32 pixels are drawn unlike each other, so that the places of
the markers alone tell two labels in three (`lra.audit`, marker places). Held against that code step by step, ours
differs at 32 × 32 in two of 360 directions of a first dash, whose far end is rounded up there by the noise of a cosine
(31 directions find a place, there 30), and where a second contour's place falls between two pixels. At 128 × 128 it
grows by the same rules, but its thick lines are not those of that code to the pixel, and the flaw tells little.
The drawing `turned` is by the published rules too, but each image is then turned and mirrored in one of the eight ways
of a square, at random: the same pixels and contours in other places.

Only +, −, ×, /, √ and comparisons act on floats here, all of them exact in IEEE arithmetic on any machine; angles come
from tables (`stamps`). Random words come from `lra.counter_rng`.
"""

from typing import NamedTuple

import numpy as np
from numba import int64, njit, uint64

from lra.counter_rng import below, draw, stream
from lra.tasks.pathfinder.occupancy import clear, copy, fits, join, occupy
from lra.tasks.pathfinder.painting import paint, turn, turn_places
from lra.tasks.pathfinder.stamps import FOOTPRINT, FREE, LIMIT, SCALE, TURN_SAMPLES, ZONE, Stamps, stamps
from lra.tasks.pathfinder.style import STYLES, Style

TRIES = 3
"""Choices of an end of a paddle before its contour is at a dead end."""

ATTEMPTS = 5
"""Starts of a distractor; what the last of them reaches is kept, however short."""

BEHIND = -0.9
"""Cosine below which no pixel next to a point of the circle lies ahead, for a radius of 3 or more."""

GUESSES = 64

BLACK = {"published": 1, "even": 3}
"""The least grey value that is kept."""

DEAD_END = 1e-4
"""Total weight of all ends of a paddle below which a contour is at a dead end."""

SIN_PI, COS_HALF_PI = np.sin(np.pi), np.cos(np.pi / 2)
"""1.2e−16 and 6.1e−17: by these the published code rounds a pivot near the top or left border up to the next pixel."""

_LOW_BITS, _UNIT = np.uint64(11), 2.0**-53


class Drawing(NamedTuple):
    """One image and the truth about it, or n of them, one behind the other in every array.

    image     (window, window) uint8
    label     uint8; 1: both markers lie on the same contour
    owner     (window, window) uint8: 0 empty, 1 or 2 that contour's ink, 3 a distractor's, where it is the brightest
    tips      (2, 2, 2): of each contour the first and the last tip, (y, x)
    marked    (2, 2): contour and tip of the two markers
    paddles   (2, length, 3): of each contour the stamps and their anchors (y, x), in the order of growth; of a turned
              image the anchors are turned, the stamps are not
    margin    of this image, which chooses the stamps
    """

    image: np.ndarray
    label: np.ndarray
    owner: np.ndarray
    tips: np.ndarray
    marked: np.ndarray
    paddles: np.ndarray
    margin: np.ndarray


class Sizes(NamedTuple):
    """What compiled code knows of a style, one of its margins and a drawing; `border` lies around a picture."""

    published: bool
    turned: bool
    black: int
    free: float
    limit: float
    window: int
    border: int
    margin: int
    paddle_length: int
    seed_distance: int
    distractors: int
    distractor_length: int


def draw_image(drawing: str, window: int, contour_length: int, seed: int, index: int) -> Drawing:
    """Image number `index` of the stream `seed`: a pure function of the five."""
    return Drawing._make(part[0] for part in draw_images(drawing, window, contour_length, seed, index, 1))


def draw_images(drawing: str, window: int, contour_length: int, seed: int, first: int, count: int) -> Drawing:
    """Images number first … first + count − 1, in one compiled call: threads wait for each other where Python works."""
    style = STYLES[window]
    kits = tuple(_kit(drawing, style, margin, contour_length) for margin in style.margins)
    contrasts = (np.array([style.paddle_contrast, style.paddle_contrast, 1]) * style.contrast).astype(np.float32)
    drawn = Drawing(
        image=np.empty((count, window, window), np.uint8),
        label=np.empty(count, np.uint8),
        owner=np.empty((count, window, window), np.uint8),
        tips=np.empty((count, 2, 2, 2), np.int64),
        marked=np.empty((count, 2, 2), np.int64),
        paddles=np.empty((count, 2, contour_length, 3), np.int64),
        margin=np.empty(count, np.int64),
    )
    _draw(kits, contrasts, np.uint64(seed), np.uint64(first), drawn)
    return drawn


def _kit(drawing: str, style: Style, margin: int, contour_length: int) -> tuple[Stamps, Sizes]:
    rules = "even" if drawing == "even" else "published"
    kit, distractors = stamps(style.window, margin, rules), style.distractors(contour_length)
    flags = rules == "published", drawing == "turned", BLACK[rules], 1 + FREE[rules], LIMIT[rules]
    lengths = style.window, len(kit.marker) // 2, margin, style.paddle_length, style.seed_distance
    return kit, Sizes(*flags, *lengths, *distractors)


# Compiled. Arguments: `random` holds key and counter; `kit` is a `Stamps`; `seen` is what a contour sees, zones and
# halos; a `chain` holds paddles, each (stamp, y, x) of its anchor; a `state` is the pivot (y, x) and the direction
# (y, x) of the last paddle.


@njit(nogil=True)
def _draw(kits, contrasts, seed, first, drawn):
    """Fills `drawn`; for each margin of the style, `kits` holds stamps and sizes."""
    random = np.empty(2, np.uint64)
    for place in range(len(drawn.image)):
        random[0], random[1] = stream(seed, first + np.uint64(place)), 0
        kit, sizes = kits[_below(random, len(kits))]
        label, one = _below(random, 2), _below(random, 2)
        drawn.label[place], drawn.margin[place] = label, sizes.margin
        marked, tips, chains = drawn.marked[place], drawn.tips[place], drawn.paddles[place]
        marked[0, 0], marked[0, 1], marked[1, 0], marked[1, 1] = one, 0, one if label else 1 - one, 1
        seen = np.empty((2, *kit.empty.shape), np.float32)  # by each contour
        for contour in range(2):
            copy(kit.empty, seen[contour])
        _grow_pair(random, kit, sizes, seen, chains, tips)
        join(seen[1], seen[0])
        distractors, found = np.empty((sizes.distractors * sizes.distractor_length, 3), np.int64), 0
        for _ in range(sizes.distractors):
            found += _grow_distractor(random, kit, sizes, seen, distractors[found : found + sizes.distractor_length])
        pictures = drawn.image[place], drawn.owner[place]
        paint(kit, sizes.black, contrasts, chains, distractors[:found], tips, marked, *pictures)
        if sizes.turned:
            way = _below(random, 8)
            for picture in pictures:
                turn(way, picture)
            for contour in range(2):
                turn_places(way, sizes.window, tips[contour])
                turn_places(way, sizes.window, chains[contour, :, 1:])


@njit(nogil=True)
def _grow_pair(random, kit, sizes, seen, chains, tips):
    """Both contours, in turn, begun anew at every dead end; fills chains and tips."""
    grown, length, state = 0, chains.shape[1], np.empty((2, 4))
    while grown < 2 * length:
        for paddle in range(grown):
            for contour in range(2):
                clear(kit, chains[paddle % 2, paddle // 2], seen[contour])
        grown = 2 if _begin_pair(random, kit, sizes, state, chains, tips) else 0
        if grown and not sizes.published:
            for contour in range(2):
                occupy(kit, chains[contour, 0], seen[1 - contour])
        while 0 < grown < 2 * length:
            step, contour = grown // 2, grown % 2
            last, paddle = chains[contour, step - 1], chains[contour, step]
            if not _extend(random, kit, sizes, seen[contour], state[contour], last, paddle):
                break
            occupy(kit, last if sizes.published else paddle, seen[1 - contour])
            grown += 1
    if sizes.published:
        occupy(kit, chains[1, length - 1], seen[1])  # and the first contour's last paddle is never seen
    for contour in range(2):
        tips[contour, 1, 0], tips[contour, 1, 1] = chains[contour, length - 1, 1], chains[contour, length - 1, 2]


@njit(nogil=True)
def _begin_pair(random, kit, sizes, state, chains, tips):
    """The first paddles, the second contour's at the seed distance from the first's; False if there is no place."""
    distance, room = sizes.seed_distance, sizes.window - 4 * sizes.seed_distance
    for contour in range(2):
        way = kit.compass[_below(random, 360)]
        if contour == 1:
            bearing = kit.compass[_below(random, 360)]
            y, x = tips[0, 0, 0] + _nearest(distance * bearing[0]), tips[0, 0, 1] + _nearest(distance * bearing[1])
        elif sizes.published:
            y, x = _free_place(random, kit, sizes, way, kit.middle)
            if y < 0:
                return False
        else:
            y, x = 2 * distance + _below(random, room), 2 * distance + _below(random, room)
        tips[contour, 0, 0], tips[contour, 0, 1] = y, x
        _start(kit, sizes, way, y, x, state[contour], chains[contour, 0])
    return True


@njit(nogil=True)
def _grow_distractor(random, kit, sizes, seen, chain):
    """A contour that starts anywhere free among what is in seen[0]; the number of its paddles, 0 for no room."""
    state, grown = np.empty(4), 0
    for _ in range(ATTEMPTS):
        copy(seen[0], seen[1])
        way = kit.compass[_below(random, 360)]
        y, x = _free_place(random, kit, sizes, way, seen[0, 0])
        grown = 0
        if y < 0:
            continue
        _start(kit, sizes, way, y, x, state, chain[0])
        grown = 1
        while grown < len(chain) and _extend(random, kit, sizes, seen[1], state, chain[grown - 1], chain[grown]):
            grown += 1
        if grown == len(chain):
            break
    if sizes.published and grown < len(chain):
        grown = 0
    if grown:
        occupy(kit, chain[grown - 1], seen[1])
        copy(seen[1], seen[0])
    return grown


@njit(nogil=True)
def _free_place(random, kit, sizes, way, occupied):
    """A pixel, uniform among those where a first paddle in this direction finds room; (−1, −1) if there is none."""
    window, paddle = sizes.window, _stamp(kit, sizes, way[0], way[1])
    if not kit.starts[paddle]:
        return -1, -1
    footprint, box = kit.paddles[paddle, FOOTPRINT], kit.boxes[paddle, 2]
    for _ in range(GUESSES):  # most often one is soon found without looking at all pixels
        place = _below(random, window * window)
        if fits(footprint, box, place // window, place % window, occupied, sizes.free):
            return place // window, place % window
    places, found = np.empty(window * window, np.int64), 0
    for y in range(window):
        for x in range(window):
            if fits(footprint, box, y, x, occupied, sizes.free):
                places[found] = y * window + x
                found += 1
    if found == 0:
        return -1, -1
    place = places[_below(random, found)]
    return place // window, place % window


@njit(nogil=True)
def _start(kit, sizes, way, y, x, state, paddle):
    """The first paddle of a contour, its tail at (y, x)."""
    if sizes.published:  # the pivot lies L + m behind the head
        length, back = sizes.paddle_length, sizes.paddle_length + sizes.margin
        pivot_y, pivot_x = _up(_up(y + length * way[0]) - back * way[0]), _up(_up(x + length * way[1]) - back * way[1])
    else:
        pivot_y, pivot_x = y - sizes.margin * way[0], x - sizes.margin * way[1]
    state[0], state[1], state[2], state[3] = pivot_y, pivot_x, way[0], way[1]
    paddle[0], paddle[1], paddle[2] = _stamp(kit, sizes, way[0], way[1]), y, x


@njit(nogil=True)
def _extend(random, kit, sizes, seen, state, last, paddle):
    """Choose the paddle after `last`, which then is seen by its contour too; False at a dead end."""
    arc, window, radius = kit.arc, sizes.window, sizes.paddle_length + sizes.margin
    stride = radius + sizes.margin
    pivot_y, pivot_x = state[0] + stride * state[2], state[1] + stride * state[3]
    if sizes.published:
        left, upright = state[2] == 0.0 and state[3] < 0.0, state[3] == 0.0
        pivot_y = np.ceil(pivot_y + stride * SIN_PI) if left else _up(pivot_y)
        pivot_x = np.ceil(pivot_x + stride * COS_HALF_PI) if upright else _up(pivot_x)
    ends, ways, weights = np.empty((len(arc), 2), np.int64), np.empty((len(arc), 2)), np.empty(len(arc))
    found, total, y, x = 0, 0.0, np.int64(-1), np.int64(-1)
    for place in range(len(arc)):
        if arc[place, 0] * state[2] + arc[place, 1] * state[3] < BEHIND:
            continue
        before_y, before_x = y, x
        end_y, end_x = pivot_y + radius * arc[place, 0], pivot_x + radius * arc[place, 1]
        if sizes.published:
            y, x = np.int64(np.floor(end_y)), np.int64(np.floor(end_x))
        else:
            y, x = _nearest(end_y), _nearest(end_x)
        if (y == before_y and x == before_x) or not (0 <= y < window and 0 <= x < window):
            continue
        way_y, way_x = y - pivot_y, x - pivot_x
        norm = np.sqrt(way_y * way_y + way_x * way_x)
        way_y, way_x = way_y / norm, way_x / norm
        room = 1.0 - seen[1, sizes.border + y, sizes.border + x]
        weight = _weight(kit.turn, way_y * state[2] + way_x * state[3]) * room
        if weight > 0.0:
            ends[found, 0], ends[found, 1], ways[found, 0], ways[found, 1] = y, x, way_y, way_x
            total += weight
            weights[found] = total
            found += 1
    if total < DEAD_END:
        return False
    for _ in range(TRIES):
        goal, chosen = total * _uniform(random), 0
        while weights[chosen] <= goal and chosen < found - 1:
            chosen += 1
        stamp = _stamp(kit, sizes, -ways[chosen, 0], -ways[chosen, 1])
        if fits(kit.paddles[stamp, ZONE], kit.boxes[stamp, 0], ends[chosen, 0], ends[chosen, 1], seen[0], sizes.limit):
            occupy(kit, last, seen)
            state[0], state[1], state[2], state[3] = pivot_y, pivot_x, ways[chosen, 0], ways[chosen, 1]
            paddle[0], paddle[1], paddle[2] = stamp, ends[chosen, 0], ends[chosen, 1]
            return True
    return False


@njit(nogil=True)
def _weight(turn, cosine):
    """Between the samples of the table, linearly."""
    place = min(max((cosine + 1.0) * (0.5 * TURN_SAMPLES), 0.0), TURN_SAMPLES - 1e-9)
    cell = np.int64(place)
    return turn[cell] + (place - cell) * (turn[cell + 1] - turn[cell])


@njit(nogil=True)
def _stamp(kit, sizes, sine, cosine):
    """The paddle from an anchor in this direction."""
    middle, length = len(kit.lookup) // 2, SCALE * sizes.paddle_length
    y, x = length * sine, length * cosine
    if sizes.published:
        return kit.lookup[middle + np.int64(_up(y)), middle + np.int64(_up(x))]
    return kit.lookup[middle + _nearest(y), middle + _nearest(x)]


@njit(nogil=True)
def _up(value):
    """The next integer, but not for what the rounding of directions left above one."""
    return np.ceil(value - 1e-7)


@njit(nogil=True)
def _nearest(value):
    return np.int64(np.floor(value + 0.5))


@njit(uint64(uint64[::1]), nogil=True)
def _word(random):
    word = draw(random[0], random[1])
    random[1] += np.uint64(1)
    return word


@njit(int64(uint64[::1], int64), nogil=True)
def _below(random, bound):
    return np.int64(below(_word(random), np.uint64(bound)))


@njit(nogil=True)
def _uniform(random):
    """0 ≤ u < 1, a multiple of 2⁻⁵³."""
    return np.float64(_word(random) >> _LOW_BITS) * _UNIT
