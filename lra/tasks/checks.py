"""Checks of what a user can set: `task.<option>=<value>` in one line if it is impossible."""

from collections.abc import Mapping
from typing import Any

from lra.errors import UserError
from lra.tasks.arrays import SPLITS


def check_choice(option: str, value: object, allowed: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise UserError(f"task.{option}={value} is not one of {', '.join(map(str, allowed))}")


def check_integer(option: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
        raise UserError(f"task.{option}={value!r} must be an integer of at least {low}")


def checked_sizes(train: int, validation: int, test: int) -> dict[str, int]:
    """The options train_size, validation_size, test_size by split."""
    sizes: dict[str, int] = dict(zip(SPLITS, (train, validation, test), strict=True))
    for split, size in sizes.items():
        check_integer(f"{split}_size", size, low=1)
    return sizes


def at_most(sizes: Mapping[str, int], available: Mapping[str, int]) -> dict[str, int]:
    """The first so many examples of each split, or all where there are fewer."""
    return {split: min(sizes[split], available[split]) for split in SPLITS}
