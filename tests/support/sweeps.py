"""Sweeps of tiny cells, driven as from a shell."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from cells import TINY

import run as entry
from lra.record import Cell
from lra.sweep import manifest, states
from lra.sweep.command import main


def sweep(*arguments: str) -> int:
    """`python scripts/sweep.py <arguments>` in this process; its exit code."""
    with mock.patch.object(sys, "argv", ["sweep.py"]), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ"))
        return main(arguments, entry.main)


def submission(results: Path, data_root: Path, *arguments: str) -> tuple[str, ...]:
    """The arguments that submit tiny cells as the sweep `one`."""
    fixed = (f"results_dir={results}", f"data.root={data_root}", "hydra.launcher.gpus=0")
    return ("submit", "--name", "one", *TINY, *fixed, *arguments)


def submit(results: Path, data_root: Path, *arguments: str) -> int:
    return sweep(*submission(results, data_root, *arguments))


def look(results: Path, verb: str, *arguments: str) -> int:
    return sweep(verb, "one", "--results-dir", str(results), *arguments)


def outcome(results: Path) -> dict[str, str]:
    """Attention to state, of sweeps in which no two cells share one."""
    return {state.entry.cell.name.partition("+")[0]: state.what for state in states.of(manifest.read(results, "one"))}


def cells(results: Path) -> list[Cell]:
    return [entry.cell for entry in manifest.read(results, "one").current]


def until(condition: Callable[[], object], seconds: float = 240, said: Callable[[], str] = str) -> None:
    """Wait for it; fail with what `said` then says."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {seconds:g} s\n{said()}"
        time.sleep(0.05)
