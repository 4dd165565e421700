"""Pathfinder: do the two markers lie on the same dashed contour?"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lra.tasks import pixels
from lra.tasks.arrays import SPLITS, Advance, Recipe, Split
from lra.tasks.base import Task
from lra.tasks.checks import at_most, check_choice, check_integer, checked_sizes
from lra.tasks.parallel import in_order
from lra.tasks.pathfinder import release
from lra.tasks.pathfinder.style import CONTOUR_LENGTHS, DRAWINGS, STYLES
from lra.tasks.registry import register
from lra.tasks.sources import Source, choose

if TYPE_CHECKING:
    from lra.tasks.pathfinder.generator import Drawing

GENERATOR_VERSION = 1
"""Raise it with every change of the generator that changes the data."""

READER_VERSION = 1

SOURCES = ("auto", "generate", "release")

CHUNK = 64
"""Images that a worker draws at a time."""

SPLIT_BITS = 40
"""Image r of split s is number s·2⁴⁰ + r of the stream, so that smaller splits are the first part of larger ones."""


@register("pathfinder", pathx={"resolution": 128})
class Pathfinder(Task):
    """Two classes, square images; 160,000 / 20,000 / 20,000, labels even.

    source                "generate" | "release" (the official folders) | "auto" (release if present, else generate)
    drawing               of the generated images: "published" (as the published generator draws, with its flaws) |
                          "turned" (the same, turned and mirrored at random) | "even" (without the flaws), see
                          `lra.tasks.pathfinder.generator`
    seed                  of the generated images; not the seed of the training
    resolution            32 (Pathfinder) | 128 (Path-X)
    contour_length        14 (hard, the benchmark's) | 9 | 6
    black                 "padding" | "pixel": what the value 0 is, see `lra.tasks.pixels`
    train_size, …         images of each split, at most
    """

    num_classes = 2

    def __init__(
        self,
        source: str = "auto",
        drawing: str = "published",
        seed: int = 0,
        resolution: int = 32,
        contour_length: int = 14,
        black: str = "padding",
        train_size: int = 160_000,
        validation_size: int = 20_000,
        test_size: int = 20_000,
    ):
        check_choice("source", source, SOURCES)
        check_choice("drawing", drawing, DRAWINGS)
        check_choice("resolution", resolution, tuple(STYLES))
        check_choice("contour_length", contour_length, CONTOUR_LENGTHS)
        check_choice("black", black, pixels.BLACK)
        check_integer("seed", seed, low=0)
        self.source, self.drawing, self.seed, self.black = source, drawing, seed, black
        self.resolution, self.contour_length = resolution, contour_length
        self.sizes = checked_sizes(train_size, validation_size, test_size)
        self.vocab_size, self.max_length = pixels.vocab_size(black), resolution**2
        self.grid = (resolution, resolution)

    def recipe(self, root: Path) -> Recipe:
        folder = release.folder(root, self.resolution, self.contour_length)
        missing = (
            f"{folder} is missing; it is part of the archive lra_release.gz of google-research/long-range-arena; "
            "task.source=generate draws images of the same kind instead"
        )
        sources = {
            "release": Source(self._release(folder), folder.exists(), missing),
            "generate": Source(self._generate()),
        }
        return choose(root, self.name, self.source, sources)

    def _parameters(self, version: int) -> dict:
        kept = {"resolution": self.resolution, "contour_length": self.contour_length, "black": self.black}
        return {"version": version, **kept, "sizes": self.sizes}

    def _generate(self) -> Recipe:
        return Recipe(
            source="generate",
            parameters={**self._parameters(GENERATOR_VERSION), "drawing": self.drawing, "seed": self.seed},
            shapes=lambda: {split: (size, self.max_length) for split, size in self.sizes.items()},
            fill=self._fill_generated,
            dtype=pixels.dtype(self.black),
            remake=True,
        )

    def _release(self, folder: Path) -> Recipe:
        splits: dict[str, list[release.Listed]] = {}

        def shapes() -> dict[str, tuple[int, ...]]:
            splits.update(release.split(release.listed(folder)))
            sizes = at_most(self.sizes, {name: len(images) for name, images in splits.items()})
            return {name: (size, self.max_length) for name, size in sizes.items()}

        def fill(arrays: dict[str, Split], advance: Advance) -> None:
            for name, split in arrays.items():
                images = splits[name][: len(split.labels)]
                for row, (image, label) in enumerate(release.read(images, self.resolution)):
                    split.tokens[row] = pixels.tokens(image[None], self.black)
                    split.labels[row] = label
                    advance(1)

        return Recipe(
            source="release",
            parameters=self._parameters(READER_VERSION),
            shapes=shapes,
            fill=fill,
            dtype=pixels.dtype(self.black),
            inputs=release.metadata(folder) if folder.exists() else (),
            notes={"split": f"80 / 10 / 10 per cent by torch's permutation for seed {release.SPLIT_SEED}"},
        )

    def _fill_generated(self, splits: dict[str, Split], advance: Advance) -> None:
        for name, split in splits.items():
            for rows, drawn in self.draw_rows(name, len(split.labels)):
                split.tokens[rows] = pixels.tokens(drawn.image, self.black)
                split.labels[rows] = drawn.label
                advance(len(drawn.label))

    def draw_rows(self, split: str, count: int) -> Iterator[tuple[slice, "Drawing"]]:
        """The chunks of `draw`, each with its place in the split."""
        row = 0
        for drawn in self.draw(split, count):
            yield slice(row, row + len(drawn.label)), drawn
            row += len(drawn.label)

    def draw(self, split: str, count: int, workers: int | None = None) -> Iterator["Drawing"]:
        """The first images of a split and the truth about them, in chunks."""
        from lra.tasks.pathfinder.generator import draw_images  # the compiler takes a second to import

        def chunk(row: int) -> "Drawing":
            number = min(CHUNK, count - row)
            return draw_images(self.drawing, self.resolution, self.contour_length, self.seed, first + row, number)

        first = SPLITS.index(split) << SPLIT_BITS
        return in_order(chunk, range(0, count, CHUNK), workers)
