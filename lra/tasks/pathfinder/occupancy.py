"""What contours see: zones and halos of paddles laid over each other. Compiled; arguments as in `generator`."""

from numba import njit

from lra.tasks.pathfinder.stamps import ZONE


@njit(nogil=True)
def fits(picture, box, y, x, occupied, limit):
    """Whether picture + occupied < limit everywhere."""
    for row in range(box[0], box[1]):
        for column in range(box[2], box[3]):
            if picture[row, column] + occupied[y + row, x + column] >= limit:
                return False
    return True


@njit(nogil=True)
def occupy(kit, paddle, seen):
    """Make a paddle's zone and halo part of what a contour sees."""
    box, y, x = kit.boxes[paddle[0], 1], paddle[1], paddle[2]
    for kind in range(2):
        for row in range(box[0], box[1]):
            source = kit.paddles[paddle[0], ZONE + kind, row, box[2] : box[3]]
            target = seen[kind, y + row, x + box[2] : x + box[3]]
            for column in range(len(source)):
                target[column] = max(target[column], source[column])


@njit(nogil=True)
def clear(kit, paddle, seen):
    """Undo `occupy` of all paddles there."""
    box, y, x = kit.boxes[paddle[0], 1], paddle[1], paddle[2]
    for kind in range(2):
        for row in range(y + box[0], y + box[1]):
            source, target = kit.empty[kind, row, x + box[2] : x + box[3]], seen[kind, row, x + box[2] : x + box[3]]
            for column in range(len(source)):
                target[column] = source[column]


@njit(nogil=True)
def join(source, target):
    for kind in range(2):
        for row in range(source.shape[1]):
            for column in range(source.shape[2]):
                target[kind, row, column] = max(target[kind, row, column], source[kind, row, column])


@njit(nogil=True)
def copy(source, target):
    for kind in range(2):
        for row in range(source.shape[1]):
            for column in range(source.shape[2]):
                target[kind, row, column] = source[kind, row, column]
