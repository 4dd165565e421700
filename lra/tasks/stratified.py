"""Splits of labelled examples that are the same everywhere: shuffled within each label by our own random numbers."""

import numpy as np


def shuffled(labels: np.ndarray, seed: int) -> np.ndarray:
    """A permutation of the examples in which every stretch has the labels in nearly their overall shares.

    A function of its arguments alone. Of the n examples with a label, number i in random order is placed at
    (i + u) / n of the way, u uniform; all are then sorted by their place.
    """
    from lra.counter_rng import draw, stream  # compiles on import

    places = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        key = stream(np.uint64(seed), np.uint64(label))
        words = np.array([draw(key, np.uint64(i)) for i in range(2 * len(members))], np.uint64)
        order = np.argsort(words[: len(members)], kind="stable")
        uniform = (words[len(members) :] >> np.uint64(11)) * 2.0**-53
        places[members[order]] = (np.arange(len(members)) + uniform) / len(members)
    return np.argsort(places, kind="stable")
