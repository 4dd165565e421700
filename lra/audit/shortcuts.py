"""What Pathfinder's labels follow from, short of tracing a contour from marker to marker.

Each audit fits on training images what it can (a threshold, a direction, which of several variants is best) and
guesses the labels of test images. Ink, pixels one by one, the markers' distance and connected components should do no
better than chance, and neither should the markers' places, which tell two labels in three of the published drawing.
`ends` is told what a network has to find by itself, and shows how far one comes without the way
between.
"""

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
from scipy.ndimage import label as label_components

from lra.audit.images import Images

RIDGE = 30.0

FEATURES = 1500
"""Of `random_ridge`."""

BRIGHTNESS = (0, 20, 60, 120)
"""Grey values above which a pixel belongs to a component."""

Guess = tuple[str, np.ndarray]
"""A name, and the guessed labels of the test images."""


def guesses(train: Images, test: Images) -> Iterator[Guess]:
    """Every audit that these images allow; the markers are known of generated ones only."""
    yield "commonest label", np.full(len(test.labels), train.labels.mean() > 0.5)
    yield "ink", threshold(ink, train, test)
    yield "linear probe", linear_probe(train, test)
    yield "connected components", threshold(lambda images: components(images.pixels, 0, 1, 0)[1], train, test)
    if train.markers is not None:
        yield "marker distance", threshold(marker_distance, train, test)
        yield "marker places", marker_places(train, test)
        yield "flood fill", flood_fill(train, test)
    if train.ends is not None:
        for dashes in (1, 2, 4):
            yield f"ends, dashes of each: {dashes}", ends(dashes, train, test)


def ink(images: Images) -> np.ndarray:
    """Mean grey value of each image."""
    return images.pixels.mean((1, 2))


def marker_distance(images: Images) -> np.ndarray:
    """In pixels."""
    assert images.markers is not None
    return np.hypot(*(images.markers[:, 0] - images.markers[:, 1]).T)


def threshold(feature: Callable[[Images], np.ndarray], train: Images, test: Images) -> np.ndarray:
    """Above or below the limit that tells most training labels apart."""
    values = feature(train)
    order = np.argsort(values, kind="stable")
    ones_below = np.r_[0, np.cumsum(train.labels[order])]
    right = ones_below[-1] - ones_below + (np.arange(len(values) + 1) - ones_below)  # where 1 is guessed above
    right = right[np.r_[True, np.diff(values[order]) > 0, True]]  # equal values lie on one side
    limits = np.r_[-np.inf, np.unique(values)]
    above = right.max() >= len(values) - right.min()
    limit = limits[right.argmax() if above else right.argmin()]
    return (feature(test) > limit) == above


def linear_probe(train: Images, test: Images) -> np.ndarray:
    """Ridge regression of the labels on the pixels."""

    def features(images: Images) -> np.ndarray:
        flat = images.pixels.reshape(len(images.pixels), -1) / np.float32(255)
        return np.concatenate([flat, np.ones_like(flat[:, :1])], axis=1)

    return features(test) @ ridge(features(train), train.labels) > 0


def ridge(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights by which features (n, features) sum to more than zero where the label is guessed 1."""
    return np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (2.0 * labels - 1))


def marker_places(train: Images, test: Images) -> np.ndarray:
    """Ridge regression on random features of where the markers lie, the one nearer to the middle first.

    It is not told which of them begins a contour: nobody who looks at the image is.
    """

    def told(images: Images) -> np.ndarray:
        assert images.markers is not None
        middle = (images.pixels.shape[-1] - 1) / 2
        places = (images.markers - middle) / middle
        order = np.hypot(*np.moveaxis(places, -1, 0)).argsort(1, kind="stable")
        near, far = np.moveaxis(np.take_along_axis(places, order[..., None], 1), 1, 0)
        return np.concatenate([near, far, far - near], axis=1)

    return random_ridge(told(train), train.labels, told(test))


def ends(dashes: int, train: Images, test: Images) -> np.ndarray:
    """Ridge regression on random features of the places of the first dashes of three ends, see `Images.ends`.

    Training images count in all eight symmetries of the square.
    """
    middle = (train.pixels.shape[-1] - 1) / 2

    def seen(images: Images) -> np.ndarray:
        assert images.ends is not None
        return images.ends[:, :, :dashes] - middle

    def told(places: np.ndarray) -> np.ndarray:
        first = places[:, :, 0]
        apart = first[:, :2] - first[:, 2:]
        parts = (first, places[:, :, 1:] - places[:, :, :1], apart, np.hypot(*np.moveaxis(apart, -1, 0)))
        return np.concatenate([part.reshape(len(places), -1) for part in parts], axis=1) / middle

    x = np.concatenate([told(turned) for turned in symmetries(seen(train))])
    return random_ridge(x, np.tile(train.labels, 8), told(seen(test)))


def random_ridge(x: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Guesses for `test` by ridge regression on random features max(0, x W + b), W and b standard normal."""
    generator = np.random.default_rng(0)
    weights, offsets = generator.standard_normal((x.shape[1], FEATURES)), generator.standard_normal(FEATURES)

    def hidden(x: np.ndarray) -> np.ndarray:
        return np.maximum(x @ weights + offsets, 0)

    return hidden(test) @ ridge(hidden(x), labels) > 0


def symmetries(places: np.ndarray) -> Iterator[np.ndarray]:
    """Places (…, 2) around the middle of a square, turned and mirrored in its eight ways."""
    for signs in product((1, -1), repeat=2):
        yield places * signs
        yield places[..., ::-1] * signs


def components(pixels: np.ndarray, above: int, neighbours: int, widened: int) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of the pixels brighter than `above`, images apart.

    neighbours   1: four of them, 2: eight
    widened      pixels by which the bright region is dilated first
    returns      (n, side, side): the component of a pixel, 0 if none; (n,): the number of them in each image
    """
    bright = pixels > above
    for _ in range(widened):
        padded = np.pad(bright, ((0, 0), (1, 1), (1, 1)))
        height, width = bright.shape[1:]
        bright = np.any([padded[:, y : y + height, x : x + width] for y, x in product(range(3), repeat=2)], axis=0)
    structure = np.zeros((3, 3, 3), bool)
    structure[1] = np.add.outer(abs(np.arange(-1, 2)), abs(np.arange(-1, 2))) <= neighbours
    found = np.asarray(label_components(bright, structure)[0])  # type: ignore[index]
    return found, np.array([len(np.unique(image)) - (image == 0).any() for image in found])


def flood_fill(train: Images, test: Images) -> np.ndarray:
    """Whether one finds from marker to marker over bright pixels: the variant that is best on the training images."""

    def connected(images: Images, variant: tuple[int, int, int]) -> np.ndarray:
        assert images.markers is not None
        found, _ = components(images.pixels, *variant)
        first, second = (found[np.arange(len(found)), *images.markers[:, marker].T] for marker in range(2))
        return (first == second) & (first > 0)

    variants = product(BRIGHTNESS, (1, 2), (0, 1))
    best = max(variants, key=lambda variant: float((connected(train, variant) == train.labels).mean()))
    return connected(test, best)


def statistics(images: Images) -> dict[str, float]:
    """Of the pixels and labels, by name; shares in per cent."""
    return {
        "black pixels": 100 * float((images.pixels == 0).mean()),
        "grey value, mean": float(images.pixels.mean()),
        "grey value, deviation": float(images.pixels.std()),
        "brightest pixel, least": float(images.pixels.max((1, 2)).min()),
        "label 1": 100 * float(images.labels.mean()),
    }
