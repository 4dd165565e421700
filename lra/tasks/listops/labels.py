"""The value of an expression by rewriting its text: slow, plain, and nothing in common with the generator."""

import re
from statistics import median

import numpy as np

from lra.tasks.listops.vocabulary import TOKENS

_VALUE = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda digits: int(median(digits)),
    "[SM": lambda digits: sum(digits) % 10,
}
_INNERMOST = re.compile(r"(\[M[AEI][DNX]|\[SM)((?: \d)+) \]")


def evaluate(tokens: np.ndarray) -> int:
    """The label of token ids (padding allowed): innermost brackets are replaced by their digit until one is left.

    ValueError if the ids are not one well-formed expression.
    """
    text = " ".join(TOKENS[token] for token in tokens if token)
    replaced = 1
    while replaced:
        text, replaced = _INNERMOST.subn(_rewrite, text)
    if len(text) != 1 or not text.isdigit():
        raise ValueError(f"not an expression: {text[:80]!r}")
    return int(text)


def _rewrite(match: re.Match[str]) -> str:
    operator, arguments = match.groups()
    return str(_VALUE[operator]([int(digit) for digit in arguments.split()]))
