"""Is there a reference between two manual pages? A small stand-in for Retrieval, in places without the internet."""

from pathlib import Path

from lra.errors import UserError
from lra.tasks import byte_text, debian
from lra.tasks.arrays import SPLITS, Advance, Recipe, Shapes, Split
from lra.tasks.base import Task
from lra.tasks.checks import check_integer
from lra.tasks.registry import register
from lra.tasks.retrieval_manuals.pages import Page, read_all
from lra.tasks.retrieval_manuals.pairs import Pair, make
from lra.tasks.sources import Source, choose

PACKAGES = ("manpages", "manpages-dev")
FOLDER = "usr/share/man"

READER_VERSION = 1


@register("retrieval_manuals")
class RetrievalManuals(Task):
    """Two classes, pairs of pages by bytes, balanced; no page is in two splits.

    max_length   bytes kept of each page, from its start
    split_seed   of the splits, and of the pairs without a link
    """

    num_classes = 2
    vocab_size = byte_text.VOCAB_SIZE
    two_towers = True

    def __init__(self, max_length: int = 4000, split_seed: int = 0):
        check_integer("max_length", max_length, low=1)
        check_integer("split_seed", split_seed, low=0)
        self.max_length, self.split_seed = max_length, split_seed

    def recipe(self, root: Path) -> Recipe:
        pages: dict[str, Page] = {}
        pairs: dict[str, list[Pair]] = {}
        notes: dict[str, str] = {}

        def shapes() -> Shapes:
            pages.update(read_all([debian.fetch(root, package, FOLDER) for package in PACKAGES]))
            pairs.update(make(pages, self.split_seed))
            if not all(pairs.values()):
                raise UserError(f"too few manual pages of {' and '.join(PACKAGES)}: {len(pages)}; install them again")
            notes["version"] = ", ".join(sorted({page.version for page in pages.values()}))
            return {name: (len(pairs[name]), 2, self.max_length) for name in SPLITS}

        def fill(splits: dict[str, Split], advance: Advance) -> None:
            for name, split in splits.items():
                for row, pair in enumerate(pairs[name]):
                    byte_text.place(pages[pair.first].text.encode(), split.tokens[row, 0])
                    byte_text.place(pages[pair.second].text.encode(), split.tokens[row, 1])
                    split.labels[row] = pair.label
                    advance(1)

        recipe = Recipe(
            source="debian",
            parameters={"version": READER_VERSION, "max_length": self.max_length, "split_seed": self.split_seed},
            shapes=shapes,
            fill=fill,
            remake=True,
            notes=notes,
        )
        at_hand = all(debian.find(root, package, FOLDER) for package in PACKAGES)
        missing = (
            f"the manual pages of Debian's packages {' and '.join(PACKAGES)} are missing; install them with apt-get"
        )
        source = Source(recipe, at_hand, None if debian.available() else missing)
        return choose(root, self.name, "auto", {"debian": source})
