"""Pairs of pages for each split: as many without a link as with one, alike in all but the link."""

from collections import defaultdict
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from lra.tasks.arrays import SPLITS
from lra.tasks.retrieval_manuals.pages import Page
from lra.tasks.stratified import shuffled

SHARES = {"train": 0.5, "validation": 0.25, "test": 0.25}
"""Of the pages; a split has about the square of its share of all links, for no page is in two splits."""

TRIES = 100
"""Random partners for a pair without a link, before its counterpart is given up too."""


class Pair(NamedTuple):
    first: str
    second: str
    label: int


def split_of(key: str, seed: int) -> str:
    """The split of a page: a function of its key and the seed, whatever other pages there are."""
    place = fraction(f"{seed}/{key}")
    for name in SPLITS:
        place -= SHARES[name]
        if place < 0:
            return name
    return SPLITS[-1]


def make(pages: Mapping[str, Page], seed: int) -> dict[str, list[Pair]]:
    """The pairs of each split.

    A pair with a link is two pages of which one's SEE ALSO names the other. For each there is one without: its first
    page with the second page of another pair of the split, of the same section of the manual as its own second page;
    so that every page comes about as often with a link as without.
    """
    links = {tuple(sorted((page.key, other))) for page in pages.values() for other in page.links if other in pages}
    linked = sorted((a, b) for a, b in links if a != b)
    splits = {key: split_of(key, seed) for key in pages}
    made = {}
    for name in SPLITS:
        inside = [turned(a, b, seed) for a, b in linked if splits[a] == splits[b] == name]
        pairs = [pair for found in balanced(inside, set(linked), seed) for pair in found]
        order = shuffled(np.array([pair.label for pair in pairs]), seed) if pairs else []
        made[name] = [pairs[index] for index in order]
    return made


def balanced(inside: list[tuple[str, str]], linked: set[tuple[str, str]], seed: int) -> list[tuple[Pair, Pair]]:
    """Each linked pair of a split with its unlinked counterpart."""
    partners, used, found = defaultdict(list), set(), []
    for _, second in inside:
        partners[section(second)].append(second)
    for first, second in inside:
        candidates = partners[section(second)]
        for attempt in range(TRIES):
            other = candidates[int(fraction(f"{seed}/{first}/{second}/{attempt}") * len(candidates))]
            unordered = (first, other) if first < other else (other, first)
            if first != other and unordered not in linked and unordered not in used:
                used.add(unordered)
                found.append((Pair(first, second, 1), Pair(first, other, 0)))
                break
    return found


def turned(a: str, b: str, seed: int) -> tuple[str, str]:
    return (a, b) if fraction(f"{seed}/{a}/{b}") < 0.5 else (b, a)


def section(key: str) -> str:
    return key.rpartition(".")[2]


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
