"""Ten classes of grey images by pixels: what Image and its stand-in have in common."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lra.tasks import pixels
from lra.tasks.arrays import Advance, Recipe, Split
from lra.tasks.base import Task
from lra.tasks.checks import at_most, check_choice, checked_sizes

SIDE = 32

Read = Callable[[str], Iterator[tuple[np.ndarray, int]]]
""""train" or "test" to its images, (32, 32) uint8, and labels, as stored; UserError at the end if they are not all."""


class GreyImages(Task):
    """32 × 32 images; validation is the last of the training images as stored.

    sources   what `task.source` may be
    counts    images of each split; a smaller split is the first part of its own
    """

    num_classes = 10
    max_length = SIDE * SIDE
    grid = (SIDE, SIDE)
    reader_version = 1

    def __init__(self, sources: tuple[str, ...], counts: Mapping[str, int], source: str, black: str, *sizes: int):
        check_choice("source", source, sources)
        check_choice("black", black, pixels.BLACK)
        self.source, self.black, self.counts = source, black, counts
        self.sizes = at_most(checked_sizes(*sizes), counts)
        self.vocab_size = pixels.vocab_size(black)

    def recipe_of(self, source: str, read: Read, **notes: Any) -> Recipe:
        """The recipe that reads both halves in order, a part of the first for validation."""

        def fill(splits: dict[str, Split], advance: Advance) -> None:
            train, test = read("train"), read("test")
            for name, images in (("train", train), ("validation", train), ("test", test)):
                count = len(splits[name].labels)
                for row in range(self.counts[name]):  # those beyond the wanted size are skipped
                    image, label = next(images)
                    if row < count:
                        splits[name].tokens[row] = pixels.tokens(image[None], self.black)
                        splits[name].labels[row] = label
                        advance(1)
            for images in (train, test):  # to its end, where it checks the count
                next(images, None)

        return Recipe(
            source=source,
            parameters={"version": self.reader_version, "black": self.black, "sizes": self.sizes},
            shapes=lambda: {split: (size, self.max_length) for split, size in self.sizes.items()},
            fill=fill,
            dtype=pixels.dtype(self.black),
            remake=True,
            notes=notes,
        )
