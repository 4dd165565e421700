"""ListOps: the value, 0 to 9, of a nested expression of MIN, MAX, MED and SM (sum modulo 10)."""

from itertools import chain
from pathlib import Path

import numpy as np

from lra.tasks.arrays import Advance, Recipe, Split
from lra.tasks.base import Task
from lra.tasks.checks import check_choice, check_integer, checked_sizes
from lra.tasks.listops import release
from lra.tasks.listops.vocabulary import CLOSE, TOKENS
from lra.tasks.registry import register
from lra.tasks.sources import Source, choose

GENERATOR_VERSION = 1
"""Raise it with every change of the generator that changes the data."""

READER_VERSION = 1

SOURCES = ("auto", "generate", "release")
BRACKETS = ("keep", "drop")


@register("listops")
class ListOps(Task):
    """Ten classes, 500 < length < 2000, 96,000 / 2,000 / 2,000 expressions.

    source                "generate" | "release" (the official TSV files) | "auto" (release if present, else generate)
    seed                  of the generated expressions; not the seed of the training
    max_length            tokens kept of each expression, from its start
    brackets              "keep" | "drop": without closing brackets, as in numbers of 2021; the structure is lost
    train_size, …         expressions generated for each split
    """

    num_classes = 10
    vocab_size = len(TOKENS)

    def __init__(
        self,
        source: str = "auto",
        seed: int = 0,
        max_length: int = 2000,
        brackets: str = "keep",
        train_size: int = 96_000,
        validation_size: int = 2_000,
        test_size: int = 2_000,
    ):
        check_choice("source", source, SOURCES)
        check_choice("brackets", brackets, BRACKETS)
        check_integer("seed", seed, low=0)
        check_integer("max_length", max_length, low=1)
        self.source, self.seed, self.max_length, self.brackets = source, seed, max_length, brackets
        self.sizes = checked_sizes(train_size, validation_size, test_size)

    def recipe(self, root: Path) -> Recipe:
        files = release.files(root)
        missing = (
            f"none of {', '.join(release.FILES.values())} is in {root}/{release.FOLDERS[1]}; "
            "they are part of the archive lra_release.gz of google-research/long-range-arena; "
            "task.source=generate makes expressions of the same distribution instead"
        )
        sources = {"release": Source(self._release(files), bool(files), missing), "generate": Source(self._generate())}
        return choose(root, self.name, self.source, sources)

    def _generate(self) -> Recipe:
        return Recipe(
            source="generate",
            parameters={
                "version": GENERATOR_VERSION,
                "seed": self.seed,
                "max_length": self.max_length,
                "brackets": self.brackets,
                "sizes": self.sizes,
            },
            shapes=lambda: {split: (size, self.max_length) for split, size in self.sizes.items()},
            fill=self._fill_generated,
            remake=True,
            notes={"vocabulary": TOKENS},
        )

    def _release(self, files: dict[str, Path]) -> Recipe:
        def fill(splits: dict[str, Split], advance: Advance) -> None:
            for name, split in splits.items():
                for row, (tokens, label) in enumerate(release.read(files[name])):
                    self._place(split, row, tokens, label)
                    advance(1)

        return Recipe(
            source="release",
            parameters={"version": READER_VERSION, "max_length": self.max_length, "brackets": self.brackets},
            shapes=lambda: {split: (release.count(path), self.max_length) for split, path in files.items()},
            fill=fill,
            inputs=tuple(files.values()),
            notes={"vocabulary": TOKENS},
        )

    def _fill_generated(self, splits: dict[str, Split], advance: Advance) -> None:
        from lra.tasks.listops.generator import expressions, unique  # the compiler takes a second to import

        rows = chain.from_iterable(((split, row) for row in range(len(split.labels))) for split in splits.values())
        for (split, row), (tokens, label) in zip(rows, unique(expressions(self.seed)), strict=False):
            self._place(split, row, tokens, label)
            advance(1)

    def _place(self, split: Split, row: int, tokens: np.ndarray, label: int) -> None:
        if self.brackets == "drop":
            tokens = tokens[tokens != CLOSE]
        tokens = tokens[: self.max_length]
        split.tokens[row, : len(tokens)] = tokens
        split.labels[row] = label
