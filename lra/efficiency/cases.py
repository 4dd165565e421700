"""What is measured: shapes, lengths, and the settings of each method at each length."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import attention

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TOKENS = {(2, 32): 131_072, (8, 64): 65_536}
"""Tokens of a call for each (heads, head dimension): the LRA `small` shape, and one of a usual encoder."""

DTYPE = "bfloat16"
BASELINE = "softmax"


@dataclass(frozen=True)
class Case:
    """One row of `efficiency.csv`: an attention at one length of one shape, with or without a padding mask."""

    attention: str
    length: int
    heads: int
    head_dim: int
    tokens: int
    masked: bool
    dtype: str = DTYPE

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.length)

    @property
    def options(self) -> dict[str, Any]:
        """Every option of the attention at this length, the ones of the table over the defaults."""
        return {**attention.options(self.attention), **table_options(self.attention, self.length, self.heads)}

    @property
    def label(self) -> str:
        mask = " masked" if self.masked else ""
        return f"{self.attention} N={self.length} H={self.heads} D={self.head_dim}{mask}"


def table_options(name: str, length: int, heads: int) -> dict[str, Any]:
    """What the table sets for an attention at a length; other options keep their defaults."""
    choose = _SETTINGS.get(name)
    return {} if choose is None else choose(length, heads)


def _combiner(length: int, heads: int) -> dict[str, Any]:
    return {"segment_length": 64 if length < 16_384 else 128}


def _routing(length: int, heads: int) -> dict[str, Any]:
    """Clusters · window = N: every token is a member once on average. Half of the heads are local."""
    window = 64 if length < 4_096 else 128
    return {
        "num_clusters": max(1, length // window),
        "window": window,
        "local_heads": heads // 2,
        "local_window": 128,
    }


_SETTINGS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "combiner": _combiner,
    "combiner_axial": _combiner,
    "routing": _routing,
}


def cases(
    names: Iterable[str],
    lengths: Iterable[int] = LENGTHS,
    shapes: Iterable[tuple[int, int]] = tuple(TOKENS),
    masks: Iterable[bool] = (False, True),
    tokens: int | None = None,
) -> Iterator[list[Case]]:
    """Groups of cases that share inputs and a baseline: one for each shape, mask and length, the shortest first."""
    lengths, names, masks = sorted(lengths), list(names), list(masks)
    for heads, head_dim in shapes:
        total = tokens or TOKENS[heads, head_dim]
        for masked in masks:
            for length in lengths:
                yield [Case(name, length, heads, head_dim, total, masked) for name in names]
