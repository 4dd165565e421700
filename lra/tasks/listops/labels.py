"""The value of an expression by rewriting its text: slow, plain, and nothing in common with the generator."""

import re
from statistics import median

import numpy as np

_LETTERS = ".mMds]0123456789"
"""One letter for each id of the vocabulary."""

_VALUE = {
    "m": min,
    "M": max,
    "d": lambda digits: int(median(map(int, digits))),
    "s": lambda digits: sum(map(int, digits)) % 10,
}
_INNERMOST = re.compile(r"([mMds])(\d+)\]")


def evaluate(tokens: np.ndarray) -> int:
    """The label of token ids (padding allowed): innermost brackets are replaced by their digit until one is left.

    ValueError if the ids are not one well-formed expression.
    """
    text = "".join(_LETTERS[token] for token in tokens.tolist()).rstrip(".")
    replaced = 1
    while replaced:
        text, replaced = _INNERMOST.subn(_rewrite, text)
    if len(text) != 1 or not text.isdigit():
        raise ValueError(f"not an expression: {text[:80]!r}")
    return int(text)


def _rewrite(match: re.Match[str]) -> str:
    operator, digits = match.groups()
    return str(_VALUE[operator](digits))
