"""Data sets of the Hugging Face hub, or their parquet files in the data folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lra.errors import UserError

FOLDER = "hub"
"""Under the data folder; files <split>-*.parquet of a repository lie anywhere in hub/<repository>/."""


def at_hand(root: Path, repository: str) -> bool:
    """Whether files of the repository are in the data folder."""
    return (Path(root) / FOLDER / repository).is_dir()


def missing(root: Path, repository: str) -> str:
    """What to do without a network."""
    folder = Path(root) / FOLDER / repository
    return (
        f"download the data set {repository} of the Hugging Face hub where there is a network "
        f"(`hf download --repo-type dataset {repository} --local-dir DIR`) and put DIR at {folder}"
    )


def rows(
    root: Path, repository: str, split: str, columns: tuple[str, ...], image: str | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a split, in their order, with a value in each of these columns; column `image` as a PIL image.

    From the files in the data folder if they are there, else from the hub; UserError if neither works.
    """
    import datasets  # takes a second

    folder = Path(root) / FOLDER / repository
    try:
        if folder.is_dir():
            files = sorted(map(str, folder.rglob(f"{split}-*.parquet")))
            if not files:
                raise UserError(f"{folder} holds no {split}-*.parquet; {missing(root, repository)}")
            loaded = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        else:
            loaded = datasets.load_dataset(repository, split=split)
        if image is not None:
            loaded = loaded.cast_column(image, datasets.Image())
        for row in loaded:
            assert isinstance(row, dict)
            if empty := [column for column in columns if row.get(column) is None]:
                raise UserError(f"{repository} has a row without {empty[0]} in {split}; it has {', '.join(row)}")
            yield row
    except UserError:
        raise
    except Exception as error:  # of whatever library the hub's client uses today
        place = folder if folder.is_dir() else f"the hub's data set {repository}"
        reason = (str(error).splitlines() or [""])[0]
        advice = missing(root, repository)
        raise UserError(f"{place} cannot be read ({type(error).__name__}: {reason}); {advice}") from error
