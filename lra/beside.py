"""One's own rows beside those of another results folder, which are not run again: `report.py --with DIR`."""

from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from lra import documents, report
from lra.efficiency import table as efficiency
from lra.errors import UserError
from lra.leaderboard import ROW
from lra.record import read_records, write_text
from lra.summary import summary

CELLS = ROW[1:]
"""What rows must share to stand beside each other: task, protocol, budget, data, device."""

CALLS = ("device", "heads", "head_dim", "tokens", "dtype", "masked", "length")
"""The same of measured calls."""

NAMES = {"data_digest": "data digest", "head_dim": "head dimension", "masked": "padding mask"}


def beside(results_dir: Path, other_dir: Path) -> tuple[list[Path], list[str]]:
    """Write leaderboard, summary and efficiency of one's own rows and the other folder's that compare with them.

    The other folder's rows carry its name, `softmax (h100)`, so that nobody's seeds are averaged with another's. They
    stand in `results_dir/with-<name>/`, since the tables of `results_dir` are its own records alone. Returns the files
    and one line for each group of rows that was refused, which says what differs. UserError where nothing compares.
    """
    if not other_dir.is_dir():
        raise UserError(f"--with {other_dir} is no folder; name the one that holds runs/ or efficiency/")
    name = other_dir.resolve().name
    folder = results_dir / f"with-{name}"
    own, other = (report.build(read_records(path)[0]).leaderboard for path in (results_dir, other_dir))
    cells, refused = joined(own, other, CELLS, name)
    mine, theirs = (efficiency.table(efficiency.read(path)[0]) for path in (results_dir, other_dir))
    calls, more = joined(mine, theirs, CALLS, name)
    texts = {}
    if len(cells) > len(own):
        averages, problems = summary(cells, report.suites())
        refused += problems
        texts |= {"leaderboard.csv": report.to_csv(cells), "summary.csv": report.to_csv(averages)}
        texts |= {"tables.md": documents.markdown(cells, averages), "tables.tex": documents.latex(cells, averages)}
    if len(calls) > len(mine):
        texts["efficiency.csv"] = efficiency.to_csv(calls)
    refused += more
    if not texts:
        raise UserError("\n".join([*refused, f"nothing of {other_dir} stands beside a row of {results_dir}"]))
    for file, text in texts.items():
        write_text(folder / file, text)
    return [folder / file for file in texts], refused


def joined(own: pd.DataFrame, other: pd.DataFrame, scope: tuple[str, ...], name: str) -> tuple[pd.DataFrame, list[str]]:
    """All own rows, and of the others, under `name`, those whose scope is that of an own row; and refusals."""
    rows, others = (list(table[list(scope)].itertuples(index=False, name=None)) for table in (own, other))
    scopes = set(rows)
    fits = np.array([row in scopes for row in others], dtype=bool)
    admitted = cast(pd.DataFrame, other.loc[fits]).copy()
    admitted["attention"] = [f"{attention} ({name})" for attention in admitted["attention"]]
    reasons = Counter(
        _difference(row, scopes, scope) for row, fit in zip(others, fits, strict=True) if scopes and not fit
    )
    refused = [f"{reason}: {count} rows of {name} left out" for reason, count in sorted(reasons.items())]
    order = [key for key in (*scope, "accuracy_mean", "attention") if key in own.columns]
    table = pd.concat([own, admitted]).astype(own.dtypes)
    table = table.sort_values(by=order, ascending=[key != "accuracy_mean" for key in order], ignore_index=True)
    return table, refused


def _difference(row: tuple, scopes: set[tuple], names: tuple[str, ...]) -> str:
    """`listops: device is NVIDIA H100, yours CPU`: how a scope differs from the one of yours that is nearest."""

    def differing(own: tuple) -> list[int]:
        return [at for at, (mine, theirs) in enumerate(zip(own, row, strict=True)) if mine != theirs]

    nearest = min(scopes, key=lambda own: (own[0] != row[0], len(differing(own)), own))
    apart = differing(nearest)
    if apart[0] == 0:  # another task, another device: the rest says nothing more
        return f"{names[0]} {row[0]} has no row of yours"
    return f"{row[0]}: " + ", ".join(
        f"{NAMES.get(names[at], names[at])} is {row[at]}, yours {nearest[at]}" for at in apart
    )
