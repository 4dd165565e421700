"""The official files of ListOps, `basic_{train,val,test}.tsv`.

    Source<TAB>Target
    ( ( ( [MAX 2 ) 9 ) ] )<TAB>9

One expression a line; the parentheses mark applications of two terms, add nothing to the brackets, and are removed.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lra.errors import UserError
from lra.tasks.listops.vocabulary import IDS

FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}

FOLDERS = ("lra_release/lra_release/listops-1000", "lra_release/listops-1000")
"""Under the data folder; the archive holds the complete tree inside, and a partial copy outside: first found wins."""

HEADER = "Source\tTarget"

_LABELS = {str(digit): digit for digit in range(10)}


def files(root: Path) -> dict[str, Path]:
    """Split to official file, in the first folder that holds any of the three; {} if none does."""
    for folder in FOLDERS:
        found = {split: Path(root) / folder / name for split, name in FILES.items()}
        if any(path.exists() for path in found.values()):
            return found
    return {}


def count(path: Path) -> int:
    """Expressions in a file, without reading them."""
    lines = sum(1 for _ in _lines(path)) - 1
    if lines < 1:
        raise UserError(f"{path} is empty: expected the header 'Source<TAB>Target' and one expression a line")
    return lines


def read(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    """Token ids (uint8, closing brackets kept) and label of each expression; UserError names file and line."""
    for number, line in enumerate(_lines(path), start=1):
        if number == 1:
            if line != HEADER:
                raise UserError(f"{path}:1: the header is {line[:40]!r}, expected 'Source<TAB>Target'")
            continue
        columns = line.split("\t")
        if len(columns) != 2:
            raise UserError(f"{path}:{number}: {len(columns)} columns, expected 2 (Source, Target)")
        source, target = columns
        if target not in _LABELS:
            raise UserError(f"{path}:{number}: label {target[:20]!r} is not a digit 0 to 9")
        tokens = source.replace("(", " ").replace(")", " ").split()
        try:
            ids = bytes([IDS[token] for token in tokens])
        except KeyError as unknown:
            known = " ".join(IDS)
            raise UserError(f"{path}:{number}: token {unknown} is not one of {known} (or a parenthesis)") from None
        if not ids:
            raise UserError(f"{path}:{number}: the expression is empty")
        yield np.frombuffer(ids, np.uint8), _LABELS[target]


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="ascii", newline="\n") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file of ListOps: it holds bytes that are not ASCII") from None
    except OSError as error:
        names = ", ".join(FILES.values())
        raise UserError(f"{path} cannot be read: {error.strerror}; all of {names} are needed") from None
