"""Text: is a film review good? IMDB by bytes."""

from pathlib import Path

import numpy as np

from lra.errors import UserError
from lra.tasks import byte_text, hub, made_up
from lra.tasks.arrays import SPLITS, Advance, Recipe, Shapes, Split
from lra.tasks.base import Task
from lra.tasks.checks import at_most, check_choice, check_integer, checked_sizes
from lra.tasks.registry import register
from lra.tasks.sources import Source, choose
from lra.tasks.stratified import shuffled

REPOSITORY = "stanfordnlp/imdb"

REVIEWS = 25_000
"""In each half of the data set, half of them good; the training half is sorted by label."""

READER_VERSION = 1

SOURCES = ("auto", "local", "hub", made_up.NAME)
VALIDATION = ("test", "train")


@register("text")
class Text(Task):
    """Two classes, bytes of a review, its head; 25,000 / 25,000 / 25,000 or 22,500 / 2,500 / 25,000.

    source                "local" (parquet files in the data folder) | "hub" (Hugging Face) | "auto"
                          | "made_up", see `lra.tasks.made_up`
    max_length            bytes kept of each review, from its start
    validation            "test": the test reviews, as all small settings do, which is optimistic
                          "train": a tenth of the training reviews, stratified, by our own random numbers
    split_seed            of that tenth, and of the order of the training reviews
    train_size, …         reviews of each split, at most
    """

    num_classes = 2
    vocab_size = byte_text.VOCAB_SIZE

    def __init__(
        self,
        source: str = "auto",
        max_length: int = 4000,
        validation: str = "test",
        split_seed: int = 0,
        train_size: int = REVIEWS,
        validation_size: int = REVIEWS,
        test_size: int = REVIEWS,
    ):
        check_choice("source", source, SOURCES)
        check_choice("validation", validation, VALIDATION)
        check_integer("max_length", max_length, low=1)
        check_integer("split_seed", split_seed, low=0)
        self.source, self.max_length, self.validation, self.split_seed = source, max_length, validation, split_seed
        self.sizes = checked_sizes(train_size, validation_size, test_size)

    def recipe(self, root: Path) -> Recipe:
        if self.source == made_up.NAME:
            shape = (self.max_length,)
            return made_up.recipe(self.sizes, shape, classes=2, highest=244, median=980.0, spread=0.72)
        local = hub.at_hand(root, REPOSITORY)
        sources = {
            "local": Source(self._recipe(root, "local"), local, hub.missing(root, REPOSITORY)),
            "hub": Source(self._recipe(root, "hub")),
        }
        return choose(root, self.name, self.source, sources)

    def _recipe(self, root: Path, source: str) -> Recipe:
        rows: dict[str, list[tuple[bytes, int]]] = {}

        def shapes() -> Shapes:
            rows.update(self.split(*(read(root, half) for half in ("train", "test"))))
            sizes = at_most(self.sizes, {name: len(part) for name, part in rows.items()})
            return {name: (size, self.max_length) for name, size in sizes.items()}

        def fill(splits: dict[str, Split], advance: Advance) -> None:
            for name, split in splits.items():
                for row, (text, label) in enumerate(rows[name][: len(split.labels)]):
                    byte_text.place(text, split.tokens[row])
                    split.labels[row] = label
                    advance(1)

        return Recipe(
            source=source,
            parameters={
                "version": READER_VERSION,
                "max_length": self.max_length,
                "validation": self.validation,
                "split_seed": self.split_seed,
                "sizes": self.sizes,
            },
            shapes=shapes,
            fill=fill,
            remake=True,
            notes={"repository": REPOSITORY},
        )

    def split(self, train: list, test: list) -> dict[str, list]:
        """The three splits; train shuffled so that any first part of it has both labels, test too for the same end."""
        train, test = (
            [half[index] for index in shuffled(np.array([label for _, label in half]), self.split_seed)]
            for half in (train, test)
        )
        held_out = len(train) // 10
        parts = (train, test, test) if self.validation == "test" else (train[held_out:], train[:held_out], test)
        return dict(zip(SPLITS, parts, strict=True))


def read(root: Path, half: str) -> list[tuple[bytes, int]]:
    """Review and label of the "train" or "test" half; UserError unless all of them are there."""
    rows = [(row["text"].encode(), int(row["label"])) for row in hub.rows(root, REPOSITORY, half, ("text", "label"))]
    good = sum(label for _, label in rows)
    if (len(rows), good) != (REVIEWS, REVIEWS // 2):
        expected = f"expected {REVIEWS:,}, half of them good"
        raise UserError(f"{REPOSITORY} has {len(rows):,} reviews in {half}, {good:,} of them good; {expected}")
    return rows
