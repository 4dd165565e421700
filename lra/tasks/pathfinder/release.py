"""The official Pathfinder images: folders of PNG files, with their labels in text files that are named .npy.

pathfinder32/curv_contour_length_14/imgs/<batch>/sample_<i>.png
pathfinder32/curv_contour_length_14/metadata/<batch>.npy

A line of the second: folder, file, number, label, … (the last fields say how it was drawn).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lra.errors import UserError
from lra.tasks.parallel import in_order

LEVELS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}

PLACES = ("lra_release/lra_release", "lra_release", ".")
"""Under the data folder; the archive holds the complete tree inside, and a partial copy outside: first found wins."""

BROKEN = {"curv_baseline/imgs/0/sample_172.png"}
"""Known to be empty in the archive (at resolution 32); left out."""

SPLIT_SEED = 42
"""Of the split that the state-space line of papers uses."""


class Listed(NamedTuple):
    """An image and its label, as a metadata file lists them."""

    path: Path
    label: int


def folder(root: Path, resolution: int, contour_length: int) -> Path:
    """Where the images of a level are, or should be."""
    places = [Path(root) / place / f"pathfinder{resolution}" / LEVELS[contour_length] for place in PLACES]
    return next((place for place in places if place.exists()), places[1])


def metadata(folder: Path) -> tuple[Path, ...]:
    """The metadata files, in the order of their numbers; UserError where there are none."""
    files = list((folder / "metadata").glob("*.npy"))
    odd = [path.name for path in files if not path.stem.isdigit()]
    if odd or not files:
        raise UserError(f"{folder / 'metadata'} holds {odd[0] if odd else 'no file'}; expected <number>.npy files")
    return tuple(sorted(files, key=lambda path: int(path.stem)))


def listed(folder: Path) -> list[Listed]:
    """All images of a level, in the order of the metadata; UserError names file and line."""
    images = []
    for file in metadata(folder):
        try:
            lines = file.read_text("ascii").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{file} is not a text file, as the official ones are in spite of their name") from None
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise UserError(f"{file}:{number}: expected folder, file, number, label 0 or 1, … in {line[:60]!r}")
            path = f"{fields[0]}/{fields[1]}"
            if f"{folder.name}/{path}" not in BROKEN:
                images.append(Listed(folder / path, int(fields[3])))
    if len(images) < 10:
        raise UserError(f"{folder / 'metadata'} lists {len(images)} images; ten are needed for three splits")
    return images


def split(images: list[Listed]) -> dict[str, list[Listed]]:
    """80 / 10 / 10 per cent, by the permutation that torch draws for seed 42."""
    import torch  # naming the tasks must not load it

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    held_out = len(images) // 10
    train = len(images) - 2 * held_out
    parts = {"train": order[:train], "validation": order[train : train + held_out], "test": order[train + held_out :]}
    return {name: [images[index] for index in part] for name, part in parts.items()}


def read(images: list[Listed], resolution: int):
    """Grey images (resolution, resolution) uint8 and labels, in order; UserError names a file that is none."""

    def decode(image: Listed) -> tuple[np.ndarray, int]:
        from PIL import Image

        try:
            with Image.open(image.path) as picture:
                pixels = np.asarray(picture.convert("L"))
        except (OSError, SyntaxError) as error:
            raise UserError(f"{image.path} is no readable image ({error}); extract it from the archive again") from None
        if pixels.shape != (resolution, resolution):
            raise UserError(f"{image.path} has {pixels.shape} pixels, expected {resolution} × {resolution}")
        return pixels, image.label

    return in_order(decode, images)
