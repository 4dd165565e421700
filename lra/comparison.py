"""Two rows of the leaderboard on the same test items, seed by seed: McNemar's test."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from lra import predictions, stats
from lra.errors import UserError
from lra.leaderboard import ROW, row_key
from lra.record import Record

SCOPE = ROW[1:]
"""What two rows must share to be compared."""

NAMES = {"data_digest": "data digest"}
HEADINGS = ("seed", "items", "{first} %", "{second} %", "difference", "only {first}", "only {second}", "p", "test")


@dataclass(frozen=True)
class Pair:
    """One seed of both rows. Accuracies and difference (first - second) in per cent; p of `stats.mcnemar`."""

    seed: int
    items: int
    first: float
    second: float
    only_first: int
    only_second: int
    p: float
    test: str

    @property
    def difference(self) -> float:
        return 100 * (self.only_first - self.only_second) / self.items


@dataclass(frozen=True)
class Comparison:
    """Two rows of one (task, protocol, budget, data digest, device), and what was left out of it, a line each."""

    first: str
    second: str
    scope: tuple[str, ...]
    pairs: list[Pair]
    left_out: list[str]

    def __str__(self) -> str:
        """A small table; behind it the mean difference with its Student-t interval over seeds."""
        task, protocol, budget, digest, device = self.scope
        head = [name.format(first=self.first, second=self.second) for name in HEADINGS]
        rows = [head, *(_cells(pair) for pair in self.pairs)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        differences = [pair.difference for pair in self.pairs]
        mean = f"mean difference {stats.mean(differences):+.2f} points over {len(differences)} seeds"
        if interval := stats.seed_interval(differences):
            mean += f", 95 % interval {interval[0]:+.2f} to {interval[1]:+.2f} (Student's t)"
        title = f"{task}, protocol {protocol}, budget {budget}, data {digest[:12]}, {device}"
        return "\n".join([title, *lines, *([mean] if self.pairs else []), *self.left_out])


def compare(results_dir: Path, records: Iterable[Record], first: str, second: str, task: str = "") -> list[Comparison]:
    """Every comparison of two rows that the records allow, of one task or of all; by scope.

    Names are those of the tables (`mra+1f0c9e2b`), without the star. UserError where one is not there; and where none
    of their rows share a scope, with one line for each two of a task: protocol, budget, data or device differ.
    """
    rows: dict[str, dict[tuple[str, ...], dict[int, Record]]] = {first: {}, second: {}}
    known = set()
    for record in records:
        name, *scope = row_key(record)
        if record["status"] != "ok" or (task and scope[0] != task):
            continue
        known.add(name.removesuffix("*"))
        if (name := name.removesuffix("*")) in rows:
            rows[name].setdefault(tuple(scope), {})[record["cell"]["seed"]] = record
    for name in (first, second):
        if not rows[name]:
            there = ", ".join(sorted(known)) or "none"
            raise UserError(f"{name} has no finished cell{f' of task={task}' if task else ''}; there are {there}")
    shared = sorted(rows[first].keys() & rows[second].keys())
    if not shared:
        of_a_task = [(mine, other) for mine, other in product(rows[first], rows[second]) if mine[0] == other[0]]
        lines = [f"{first} and {second} do not compare on {_difference(*scopes)}" for scopes in of_a_task]
        raise UserError("\n".join(sorted(lines)) or f"{first} and {second} have no finished cell of the same task")
    made = [_comparison(results_dir, first, second, at, rows[first][at], rows[second][at]) for at in shared]
    if not any(comparison.pairs for comparison in made):
        raise UserError("\n".join(line for comparison in made for line in comparison.left_out))
    return made


def _comparison(
    results_dir: Path,
    first: str,
    second: str,
    scope: tuple[str, ...],
    firsts: dict[int, Record],
    seconds: dict[int, Record],
) -> Comparison:
    pairs, left_out = [], []
    for seed in sorted(firsts.keys() | seconds.keys()):
        try:
            if missing := [name for name, of in ((first, firsts), (second, seconds)) if seed not in of]:
                raise UserError(f"{missing[0]} has no finished cell of it")
            mine, other = (predictions.read(results_dir, of[seed]) for of in (firsts, seconds))
            if not np.array_equal(mine.labels, other.labels):
                raise UserError("the test items differ though the data digest is the same")
        except UserError as reason:
            left_out.append(f"{scope[0]}: seed {seed} is left out: {reason}")
        else:
            pairs.append(_pair(seed, mine.right(), other.right()))
    return Comparison(first, second, scope, pairs, left_out)


def _pair(seed: int, mine: np.ndarray, other: np.ndarray) -> Pair:
    only_first, only_second = int((mine & ~other).sum()), int((other & ~mine).sum())
    p, test = stats.mcnemar(only_first, only_second)
    first, second = (stats.accuracy(int(right.sum()), len(right)) for right in (mine, other))
    return Pair(seed, len(mine), first, second, only_first, only_second, p, test)


def _difference(one: Sequence[str], other: Sequence[str]) -> str:
    """`listops: protocol is small and clean`: in what two scopes of a task differ."""
    keys = zip(SCOPE, one, other, strict=True)
    parts = [f"{NAMES.get(key, key)} is {mine[:40]} and {theirs[:40]}" for key, mine, theirs in keys if mine != theirs]
    return f"{one[0]}: {', '.join(parts)}"


def _cells(pair: Pair) -> list[str]:
    numbers: list[Any] = [pair.seed, pair.items, f"{pair.first:.2f}", f"{pair.second:.2f}", f"{pair.difference:+.2f}"]
    p = f"{pair.p:.4f}" if pair.p >= 1e-4 else f"{pair.p:.1e}"
    return list(map(str, [*numbers, pair.only_first, pair.only_second, p, pair.test]))
