"""Fashion-MNIST by pixels: a stand-in for grey CIFAR-10 in places without the internet, with a name of its own."""

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lra.errors import UserError
from lra.tasks import debian, hub
from lra.tasks.arrays import Recipe
from lra.tasks.grey_images import GreyImages
from lra.tasks.registry import register
from lra.tasks.sources import Source, choose

PACKAGE, FOLDER = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
REPOSITORY = "zalando-datasets/fashion_mnist"
LOCAL = "fashion-mnist"
"""Folder under the data folder for the four files, wherever they come from."""

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}

SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Of the unpacked files."""

COUNTS = {"train": 55_000, "validation": 5_000, "test": 10_000}

BORDER = 2
"""28 × 28 images get a black border of so many pixels."""

SOURCES = ("auto", "local", "debian", "hub")

Images = Iterator[tuple[np.ndarray, int]]
"""(32, 32) uint8 and label of 60,000 and 10,000 images."""


@register("image_fashion")
class ImageFashion(GreyImages):
    """Ten kinds of clothes, 32 × 32 pixels; 55,000 / 5,000 / 10,000, validation the last of the 60,000.

    source                "local" (its files in the data folder) | "debian" (a package) | "hub" (Hugging Face) | "auto"
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
        local = Path(root) / LOCAL
        missing = f"{local} is missing: put {', '.join(name for pair in FILES.values() for name in pair)} there"
        sources = {
            "local": Source(self.recipe_of("local", lambda part: read(local, part)), local.is_dir(), missing),
            "debian": Source(
                self.recipe_of("debian", lambda part: read(debian.fetch(root, PACKAGE, FOLDER), part)),
                debian.find(root, PACKAGE, FOLDER) is not None,
                None if debian.available() else f"`apt-get install {PACKAGE}` on a Debian machine brings them",
            ),
            "hub": Source(self.recipe_of("hub", lambda part: read_hub(root, part)), hub.at_hand(root, REPOSITORY)),
        }
        return choose(root, self.name, self.source, sources)


def read(folder: Path, part: str) -> Images:
    """Images and labels of "train" or "test" from IDX files; UserError if they are not the known ones."""
    images, labels = (_unpack(folder / name) for name in FILES[part])
    yield from zip(map(_bordered, images[16:].reshape(-1, 28, 28)), labels[8:].tolist(), strict=True)


def read_hub(root: Path, part: str) -> Images:
    """The same from the hub; UserError unless it has as many images."""
    expected = COUNTS["test"] if part == "test" else COUNTS["train"] + COUNTS["validation"]
    found = 0
    for row in hub.rows(root, REPOSITORY, part, ("image", "label"), image="image"):
        found += 1
        if found <= expected:
            yield _bordered(np.asarray(row["image"], np.uint8)), int(row["label"])
    if found != expected:
        raise UserError(f"{REPOSITORY} has {found} images in {part}, expected {expected}")


def _bordered(image: np.ndarray) -> np.ndarray:
    return np.pad(image, BORDER)


def _unpack(file: Path) -> np.ndarray:
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read ({error}); get it again") from None
    if hashlib.sha256(content).hexdigest() != SHA256[file.name]:
        raise UserError(f"{file} is not the file of Fashion-MNIST: its sha256 differs; get it again")
    return np.frombuffer(content, np.uint8)
