"""Image: CIFAR-10 in grey, by pixels."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lra.errors import UserError
from lra.tasks import hub, made_up, pixels
from lra.tasks.arrays import Recipe
from lra.tasks.grey_images import SIDE, GreyImages
from lra.tasks.registry import register
from lra.tasks.sources import Source, choose

REPOSITORY = "uoft-cs/cifar10"

COUNTS = {"train": 45_000, "validation": 5_000, "test": 10_000}

SOURCES = ("auto", "local", "hub", made_up.NAME)


@register("image")
class ImageTask(GreyImages):
    """Ten classes, 32 × 32 grey pixels; 45,000 / 5,000 / 10,000, validation the last of the 50,000 as stored.

    source                "local" (parquet files in the data folder) | "hub" (Hugging Face) | "auto"
                          | "made_up", see `lra.tasks.made_up`
    black                 "padding" | "pixel": what the value 0 is, see `lra.tasks.pixels`
    train_size, …         images of each split, at most
    """

    def __init__(
        self,
        source: str = "auto",
        black: str = "padding",
        train_size: int = COUNTS["train"],
        validation_size: int = COUNTS["validation"],
        test_size: int = COUNTS["test"],
    ):
        super().__init__(SOURCES, COUNTS, source, black, train_size, validation_size, test_size)

    def recipe(self, root: Path) -> Recipe:
        if self.source == made_up.NAME:
            shape, highest, dtype = (self.max_length,), self.vocab_size - 1, pixels.dtype(self.black)
            return made_up.recipe(self.sizes, shape, classes=self.num_classes, highest=highest, dtype=dtype)
        notes = {"repository": REPOSITORY, "grey": "(19595 R + 38470 G + 7471 B + 32768) >> 16"}
        local, remote = (self.recipe_of(source, lambda half: read(root, half), **notes) for source in ("local", "hub"))
        sources = {
            "local": Source(local, hub.at_hand(root, REPOSITORY), hub.missing(root, REPOSITORY)),
            "hub": Source(remote),
        }
        return choose(root, self.name, self.source, sources)


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
