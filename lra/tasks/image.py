"""Image: CIFAR-10 in grey, by pixels."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lra.errors import UserError
from lra.tasks import hub, made_up, pixels
from lra.tasks.arrays import Advance, Recipe, Split
from lra.tasks.base import Task
from lra.tasks.checks import at_most, check_choice, checked_sizes
from lra.tasks.registry import register
from lra.tasks.sources import Source, choose

REPOSITORY = "uoft-cs/cifar10"

COUNTS = {"train": 45_000, "validation": 5_000, "test": 10_000}

SIDE = 32

READER_VERSION = 1

SOURCES = ("auto", "local", "hub", made_up.NAME)


@register("image")
class ImageTask(Task):
    """Ten classes, 32 × 32 grey pixels; 45,000 / 5,000 / 10,000, validation the last of the 50,000 as stored.

    source                "local" (parquet files in the data folder) | "hub" (Hugging Face) | "auto"
                          | "made_up", see `lra.tasks.made_up`
    black                 "padding" | "pixel": what the value 0 is, see `lra.tasks.pixels`
    train_size, …         images of each split, at most
    """

    num_classes = 10
    max_length = SIDE * SIDE
    grid = (SIDE, SIDE)

    def __init__(
        self,
        source: str = "auto",
        black: str = "padding",
        train_size: int = COUNTS["train"],
        validation_size: int = COUNTS["validation"],
        test_size: int = COUNTS["test"],
    ):
        check_choice("source", source, SOURCES)
        check_choice("black", black, pixels.BLACK)
        self.source, self.black = source, black
        self.sizes = at_most(checked_sizes(train_size, validation_size, test_size), COUNTS)
        self.vocab_size = pixels.vocab_size(black)

    def recipe(self, root: Path) -> Recipe:
        if self.source == made_up.NAME:
            shape, highest, dtype = (self.max_length,), self.vocab_size - 1, pixels.dtype(self.black)
            return made_up.recipe(self.sizes, shape, classes=self.num_classes, highest=highest, dtype=dtype)
        local = hub.at_hand(root, REPOSITORY)
        sources = {
            "local": Source(self._recipe(root, "local"), local, hub.missing(root, REPOSITORY)),
            "hub": Source(self._recipe(root, "hub")),
        }
        return choose(root, self.name, self.source, sources)

    def _recipe(self, root: Path, source: str) -> Recipe:
        def fill(splits: dict[str, Split], advance: Advance) -> None:
            train, test = (read(root, half) for half in ("train", "test"))
            for name, images in (("train", train), ("validation", train), ("test", test)):
                count = len(splits[name].labels)
                for row in range(COUNTS[name]):  # those beyond the wanted size are skipped
                    image, label = next(images)
                    if row < count:
                        splits[name].tokens[row] = pixels.tokens(image[None], self.black)
                        splits[name].labels[row] = label
                        advance(1)
            for images in (train, test):  # to its end, where it checks the count
                next(images, None)

        return Recipe(
            source=source,
            parameters={"version": READER_VERSION, "black": self.black, "sizes": self.sizes},
            shapes=lambda: {split: (size, self.max_length) for split, size in self.sizes.items()},
            fill=fill,
            dtype=pixels.dtype(self.black),
            remake=True,
            notes={"repository": REPOSITORY, "grey": "(19595 R + 38470 G + 7471 B + 32768) >> 16"},
        )


def read(root: Path, half: str) -> Iterator[tuple[np.ndarray, int]]:
    """Grey images (32, 32) uint8 and labels of "train" or "test"; UserError unless there are as many as there are."""
    expected = COUNTS["test"] if half == "test" else COUNTS["train"] + COUNTS["validation"]
    found = 0
    for row in hub.rows(root, REPOSITORY, half, ("img", "label"), image="img"):
        image = np.asarray(row["img"].convert("RGB"), np.uint8)
        if image.shape != (SIDE, SIDE, 3):
            raise UserError(f"image {found} of {REPOSITORY}, {half}, has shape {image.shape}, expected 32 × 32 × 3")
        found += 1
        if found <= expected:
            yield pixels.grey(image), int(row["label"])
    if found != expected:
        raise UserError(f"{REPOSITORY} has {found:,} images in {half}, expected {expected:,}")
