"""Made-up data in the shape of a task whose data cannot be had: for measuring speed, never to learn from.

Uniform tokens, random labels. Lengths are log-normal, cut to what the task keeps: of film reviews (median 980 bytes,
mean about 1,300) for Text, of papers (nearly all longer than 4,000) for Retrieval; an image has no padding.
"""

from collections.abc import Mapping

import numpy as np

from lra.tasks.arrays import SPLITS, Advance, Recipe, Split

NAME = "made_up"
"""The value of `task.source`; `auto` never takes it."""

VERSION = 1


def recipe(
    sizes: Mapping[str, int],
    shape: tuple[int, ...],
    *,
    classes: int,
    highest: int,
    median: float | None = None,
    spread: float = 0.0,
    dtype: type[np.uint8] | type[np.int16] = np.uint8,
) -> Recipe:
    """Splits of these sizes: token ids 1 … highest of (…, L) = `shape`, labels below `classes`.

    median, spread   of the lengths: exp(log median + spread · z), z a standard normal; None: all of length L
    """

    def fill(splits: dict[str, Split], advance: Advance) -> None:
        for number, name in enumerate(SPLITS):
            draw = np.random.default_rng([VERSION, number])
            tokens, labels = splits[name]
            for row in range(len(labels)):
                tokens[row] = draw.integers(1, highest + 1, shape)
                if median is not None:
                    lengths = median * np.exp(spread * draw.standard_normal((*shape[:-1], 1)))
                    tokens[row][np.arange(shape[-1]) >= np.maximum(lengths, 1.0)] = 0
                labels[row] = draw.integers(classes)
                advance(1)

    parameters = {"version": VERSION, "sizes": dict(sizes), "shape": list(shape), "highest": highest}
    parameters |= {"classes": classes, "median": median, "spread": spread}
    shapes = {name: (size, *shape) for name, size in sizes.items()}
    return Recipe(NAME, parameters, lambda: shapes, fill, dtype=dtype, remake=True)
