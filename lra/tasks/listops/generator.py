"""Random ListOps expressions, as the benchmark defines them: compiled, parallel, the same for any number of workers.

    tree(depth) = [OP tree(depth+1) … ] with probability 1/4 if depth < 10, with 2 to 10 arguments, else a digit

all choices uniform; the root has depth 1. Length counts tokens without parentheses; a tree is kept if
500 < length < 2000 (Tay et al. 2020, and their released generator).
"""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import count
from typing import NamedTuple

import numpy as np
from numba import njit

from lra.counter_rng import below, draw, stream
from lra.tasks.listops.vocabulary import CLOSE, MAX, MIN, SM, ZERO
from lra.tasks.parallel import in_order

MAX_DEPTH = 10
MIN_ARGUMENTS, MAX_ARGUMENTS = 2, 10
SHORTER, LONGER = 500, 2000
"""Lengths strictly between these are kept."""

CHUNK = 8192
"""Candidates a worker grows at a time, about 680 of which are kept."""

_OPERATOR_SHIFT, _KIND_SHIFT, _KIND_BITS = np.uint64(62), np.uint64(32), np.uint64(3)
_ARITIES, _DIGITS = np.uint64(MAX_ARGUMENTS - MIN_ARGUMENTS + 1), np.uint64(10)


class Chunk(NamedTuple):
    """Kept expressions of consecutive candidates: tokens (n, 2000) uint8, 0 after the end; lengths, labels (n,)."""

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


def expressions(seed: int, workers: int | None = None) -> Iterator[Chunk]:
    """All kept expressions of the stream `seed`, without end, in the order of their candidates."""
    return in_order(lambda start: grow_chunk(seed, start, CHUNK), count(0, CHUNK), workers)


def unique(chunks: Iterable[Chunk]) -> Iterator[tuple[np.ndarray, int]]:
    """Tokens and label of each expression, the first of equal ones only."""
    seen: set[bytes] = set()
    for tokens, lengths, labels in chunks:
        for row, length, label in zip(tokens, lengths, labels, strict=True):
            expression = row[:length]
            fingerprint = blake2b(expression.tobytes(), digest_size=16).digest()
            if fingerprint not in seen:
                seen.add(fingerprint)
                yield expression, int(label)


def grow_chunk(seed: int, start: int, candidates: int) -> Chunk:
    """The kept ones among candidates start … start + candidates − 1 of the stream `seed`."""
    tokens = np.zeros((candidates, LONGER), np.uint8)  # mostly untouched, so mostly no memory
    lengths, labels = np.zeros(candidates, np.int64), np.zeros(candidates, np.uint8)
    kept = _grow_chunk(np.uint64(seed), np.uint64(start), candidates, tokens, lengths, labels)
    return Chunk(tokens[:kept], lengths[:kept], labels[:kept])


@njit(nogil=True)
def _grow_chunk(seed, start, candidates, tokens, lengths, labels):
    tree = np.empty(LONGER, np.uint8)
    kept = 0
    for offset in range(candidates):
        length, label = _grow(stream(seed, start + np.uint64(offset)), tree)
        if SHORTER < length < LONGER:
            for place in range(length):
                tokens[kept, place] = tree[place]
            lengths[kept], labels[kept] = length, label
            kept += 1
    return kept


@njit(nogil=True)
def _grow(key, tree):
    """Write one random tree into `tree`, one random word a node; its length (LONGER if it does not fit) and value."""
    kinds, arities, filled = np.empty(MAX_DEPTH, np.int64), np.empty(MAX_DEPTH, np.int64), np.empty(MAX_DEPTH, np.int64)
    values = np.empty((MAX_DEPTH, MAX_ARGUMENTS), np.int64)
    depth, length, drawn = 0, 0, np.uint64(0)  # depth counts the open operators
    while length < LONGER:
        word = draw(key, drawn)
        drawn += np.uint64(1)
        if depth < MAX_DEPTH - 1 and (word >> _OPERATOR_SHIFT) == np.uint64(0):
            kinds[depth] = MIN + np.int64((word >> _KIND_SHIFT) & _KIND_BITS)
            arities[depth] = MIN_ARGUMENTS + np.int64(below(word, _ARITIES))
            filled[depth] = 0
            tree[length] = kinds[depth]
            length += 1
            depth += 1
            continue
        value = np.int64(below(word, _DIGITS))
        tree[length] = ZERO + value
        length += 1
        while depth > 0:  # hand the value to the operator above, and close those that are complete
            values[depth - 1, filled[depth - 1]] = value
            filled[depth - 1] += 1
            if filled[depth - 1] < arities[depth - 1]:
                break
            if length == LONGER:
                return LONGER, 0
            depth -= 1
            tree[length] = CLOSE
            length += 1
            value = _apply(kinds[depth], values[depth], arities[depth])
        if depth == 0:
            return length, value
    return LONGER, 0


@njit(nogil=True)
def _apply(kind, arguments, arity):
    """MIN, MAX, SM = sum mod 10, MED = mean of the two middle values, rounded down; sorts the arguments."""
    if kind == SM:
        total = 0
        for place in range(arity):
            total += arguments[place]
        return total % 10
    for end in range(1, arity):  # insertion sort: at most ten values
        value, place = arguments[end], end
        while place > 0 and arguments[place - 1] > value:
            arguments[place] = arguments[place - 1]
            place -= 1
        arguments[place] = value
    if kind == MIN:
        return arguments[0]
    if kind == MAX:
        return arguments[arity - 1]
    return (arguments[(arity - 1) // 2] + arguments[arity // 2]) // 2
