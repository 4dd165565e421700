"""The ladder of ListOps: what accuracy one reaches who understands so much of the structure, and no more.

A published 37 per cent is what the root operator alone gives; to know where a score stands, compare it with these.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lra.tasks.arrays import Split
from lra.tasks.listops.vocabulary import CLOSE, MAX, MED, MIN, SM, ZERO

MODAL = {MIN: 0, MAX: 9, MED: 4, SM: 5}
"""The commonest value of a deep subtree with this operator at its root."""

DEEPEST = 9
"""Levels of operators in an expression; exact to all of them is exact."""

LENGTHS = (500, 750, 1000, 1250, 1500, 2000)
"""Bounds of the bins of length, in tokens; an expression has more than 500 and fewer than 2,000."""


class Node(NamedTuple):
    """An operator and its arguments: digits and nodes."""

    operator: int
    arguments: "list[int | Node]"


class Rung(NamedTuple):
    """correct of total items: of a predictor that knows so much, or of the items that so much knowledge settles."""

    knows: str
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def parse(tokens: np.ndarray) -> "int | Node":
    """The tree of an expression with its closing brackets; ValueError for one that was cut."""
    stack: list[Node] = [Node(0, [])]
    for token in tokens[tokens > 0].tolist():
        if token < CLOSE:
            stack.append(Node(token, []))
        elif token == CLOSE:
            complete = stack.pop()
            stack[-1].arguments.append(complete)
        else:
            stack[-1].arguments.append(token - ZERO)
    if len(stack) != 1 or len(stack[0].arguments) != 1:
        raise ValueError("not a complete expression; the ladder needs task.brackets=keep and task.max_length=2000")
    return stack[0].arguments[0]


def apply(operator: int, values: list[int]) -> int:
    if operator == SM:
        return sum(values) % 10
    if operator == MED:
        ordered = sorted(values)
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
    return min(values) if operator == MIN else max(values)


def value(tree: "int | Node", levels: int) -> int:
    """The value, where operators below so many levels give their modal value, whatever their arguments."""
    if isinstance(tree, int):
        return tree
    if levels == 0:
        return MODAL[tree.operator]
    return apply(tree.operator, [value(argument, levels - 1) for argument in tree.arguments])


def _root(tree: "int | Node") -> Hashable:
    return tree.operator if isinstance(tree, Node) else tree


def _arity(tree: "int | Node") -> Hashable:
    return (tree.operator, len(tree.arguments)) if isinstance(tree, Node) else tree


def _digits(tree: "int | Node") -> Hashable:
    if isinstance(tree, int):
        return tree
    digits = [argument for argument in tree.arguments if isinstance(argument, int)]
    return tree.operator, apply(tree.operator, digits) if digits else None


LOOKED_UP: dict[str, Callable] = {
    "nothing: the class prior": lambda tree: None,
    "the root operator": _root,
    "the root operator and its arity": _arity,
    "the root operator and what its literal digits give": _digits,
}
"""What is known of an expression; the commonest training label of those that share it is predicted."""


def climb(train: Split, test: Split) -> Iterator[Rung]:
    """The rungs from the class prior to exact evaluation, their accuracy on the test expressions."""
    trees = {name: [parse(tokens) for tokens in split.tokens] for name, split in (("train", train), ("test", test))}
    for knows, key in LOOKED_UP.items():
        counts: dict[Hashable, Counter[int]] = defaultdict(Counter)
        for tree, label in zip(trees["train"], train.labels.tolist(), strict=True):
            counts[key(tree)][label] += 1
        best = {seen: found.most_common(1)[0][0] for seen, found in counts.items()}
        guesses = [best.get(key(tree), 0) for tree in trees["test"]]
        yield Rung(knows, int((np.array(guesses) == test.labels).sum()), len(test.labels))
    for levels in range(1, DEEPEST + 1):
        guesses = np.array([value(tree, levels) for tree in trees["test"]])
        yield Rung(_levels(levels), int((guesses == test.labels).sum()), len(test.labels))


def depth(tree: "int | Node") -> int:
    """The least number of levels from which on exact evaluation gives the value, whatever stands for what is deeper.

    All expressions nest as deep, but of most the value follows from their upper levels: MAX of a 9 is 9.
    """
    exact, levels = value(tree, DEEPEST), DEEPEST
    while levels and value(tree, levels - 1) == exact:
        levels -= 1
    return levels


def by_depth(test: Split, right: np.ndarray) -> Iterator[Rung]:
    """The test items by `depth`, and how many of each are among the `right` ones (n,)."""
    depths = np.array([depth(parse(tokens)) for tokens in test.tokens])
    for levels in np.unique(depths).tolist():
        chosen = right[depths == levels]
        knows = _levels(levels) if levels else "the root operator's modal value"
        yield Rung(knows, int(chosen.sum()), len(chosen))


def by_length(test: Split, right: np.ndarray) -> Iterator[Rung]:
    """The test items by their number of tokens, closing brackets included."""
    lengths = (np.asarray(test.tokens) > 0).sum(1)
    for low, high in pairwise(LENGTHS):
        chosen = right[(low < lengths) & (lengths <= high)]
        if len(chosen):
            yield Rung(f"{low + 1:,} to {high:,}", int(chosen.sum()), len(chosen))


def _levels(levels: int) -> str:
    return f"{levels} level{'s' * (levels > 1)} exactly, below them the operators"
