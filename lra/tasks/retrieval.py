"""Retrieval: does one paper cite the other? Pairs of the ACL Anthology Network (AAN) by bytes, one tower for each.

    label<TAB>id<TAB>id<TAB>text<TAB>text

One pair a line, the label a number, no header, no quoting: quotes are part of a text, and a reader that obeys them
loses pairs.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from lra.errors import UserError
from lra.tasks import byte_text, made_up
from lra.tasks.arrays import Advance, Recipe, Shapes, Split
from lra.tasks.base import Task
from lra.tasks.checks import at_most, check_choice, check_integer, checked_sizes
from lra.tasks.registry import register
from lra.tasks.sources import Source, choose

FILES = {"train": "new_aan_pairs.train.tsv", "validation": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}

COUNTS = {"train": 147_086, "validation": 18_090, "test": 17_437}

REPOSITORY, INSIDE = "OpenNLPLab/lra", "data/aan"
"""A mirror of the files on the Hugging Face hub, 10.6 GB."""

FOLDERS = ("lra_release/lra_release/tsv_data", "lra_release/tsv_data", f"hub/{REPOSITORY}/{INSIDE}")
"""Under the data folder; the archive holds the complete tree inside, and a partial copy outside: first found wins."""

LABELS = {b"0": 0, b"1": 1, b"0.0": 0, b"1.0": 1}

READER_VERSION = 1

SOURCES = ("auto", "release", "hub", made_up.NAME)


@register("retrieval")
class Retrieval(Task):
    """Two classes, pairs of papers by bytes; 147,086 / 18,090 / 17,437.

    source                "release" (the official TSV files) | "hub" (a mirror of them, 10.6 GB) | "auto"
                          | "made_up", see `lra.tasks.made_up`
    max_length            bytes kept of each paper, from its start
    train_size, …         pairs of each split, at most
    """

    num_classes = 2
    vocab_size = byte_text.VOCAB_SIZE
    two_towers = True

    def __init__(
        self,
        source: str = "auto",
        max_length: int = 4000,
        train_size: int = COUNTS["train"],
        validation_size: int = COUNTS["validation"],
        test_size: int = COUNTS["test"],
    ):
        check_choice("source", source, SOURCES)
        check_integer("max_length", max_length, low=1)
        self.source, self.max_length = source, max_length
        self.sizes = at_most(checked_sizes(train_size, validation_size, test_size), COUNTS)

    def recipe(self, root: Path) -> Recipe:
        if self.source == made_up.NAME:
            shape = (2, self.max_length)
            return made_up.recipe(self.sizes, shape, classes=2, highest=244, median=20_000.0, spread=0.6)
        found = files(root)
        missing = (
            f"none of {', '.join(FILES.values())} is in {Path(root) / FOLDERS[1]}; they are part of the archive "
            "lra_release.gz of google-research/long-range-arena"
        )
        sources = {
            "release": Source(self._recipe("release", lambda: found, tuple(found.values())), bool(found), missing),
            "hub": Source(self._recipe("hub", lambda: fetch(root))),
        }
        return choose(root, self.name, self.source, sources)

    def _recipe(self, source: str, locate: Callable[[], dict[str, Path]], inputs: tuple[Path, ...] = ()) -> Recipe:
        found: dict[str, Path] = {}

        def shapes() -> Shapes:
            found.update(locate())
            return {name: (size, 2, self.max_length) for name, size in self.sizes.items()}

        def fill(splits: dict[str, Split], advance: Advance) -> None:
            for name, split in splits.items():
                pairs = read(found[name], COUNTS[name])
                for row, (label, first, second) in enumerate(islice(pairs, len(split.labels))):
                    byte_text.place(first, split.tokens[row, 0])
                    byte_text.place(second, split.tokens[row, 1])
                    split.labels[row] = label
                    advance(1)
                if len(split.labels) == COUNTS[name]:
                    next(pairs, None)  # to the end, where it checks the count

        return Recipe(
            source=source,
            parameters={"version": READER_VERSION, "max_length": self.max_length, "sizes": self.sizes},
            shapes=shapes,
            fill=fill,
            inputs=inputs,
        )


def files(root: Path) -> dict[str, Path]:
    """Split to file, in the first folder that holds any of the three; {} if none does."""
    for folder in FOLDERS:
        found = {split: Path(root) / folder / name for split, name in FILES.items()}
        if any(path.exists() for path in found.values()):
            return found
    return {}


def fetch(root: Path) -> dict[str, Path]:
    """The files of the mirror, downloaded into the data folder; a download that broke off is continued."""
    from huggingface_hub import hf_hub_download  # takes a second

    place = Path(root) / "hub" / REPOSITORY
    try:
        return {
            split: Path(hf_hub_download(REPOSITORY, f"{INSIDE}/{name}", repo_type="dataset", local_dir=place))
            for split, name in FILES.items()
        }
    except Exception as error:  # of whatever library the hub's client uses today
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(
            f"the AAN pairs cannot be downloaded from the hub's data set {REPOSITORY} ({reason}); put "
            f"{', '.join(FILES.values())} of it, or of the archive lra_release.gz of google-research/long-range-arena, "
            f"into {Path(root) / FOLDERS[1]}"
        ) from error


def read(file: Path, expected: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Label and the two texts of each pair, one line in memory at a time; UserError names file and line."""
    number = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                fields = line.rstrip(b"\n").split(b"\t")
                if len(fields) != 5:
                    raise UserError(f"{file}:{number}: {len(fields)} columns, expected 5 (label, two ids, two texts)")
                if fields[0] not in LABELS:
                    raise UserError(f"{file}:{number}: label {fields[0][:20]!r} is not 0 or 1")
                if b"\xff" in fields[3] + fields[4]:
                    raise UserError(f"{file}:{number}: a byte 255, which no UTF-8 text holds")
                if number > expected:
                    break
                yield LABELS[fields[0]], fields[3], fields[4]
    except OSError as error:
        names = ", ".join(FILES.values())
        raise UserError(f"{file} cannot be read: {error.strerror}; all of {names} are needed") from None
    if number != expected:
        more = "more than " if number > expected else ""
        found = f"{more}{min(number, expected):,}"
        raise UserError(f"{file} holds {found} pairs, expected {expected:,}; it is cut, or another file")
