"""Cells small enough for a test: `run.py` in this process, on a few short expressions."""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import pytest

import run as entry
from lra import cli
from lra.module import CellModule
from lra.record import FILENAME, Record, read_record, read_records

TINY = (
    "task.train_size=40",
    "task.validation_size=12",
    "task.test_size=12",
    "task.max_length=32",
    "model.max_length=32",
    "training.batch_size=8",
    "training.steps=6",
    "training.warmup_steps=2",
    "training.validate_every=2",
    "trainer=cpu",
    "budget=demo",
)
"""Six steps with a validation after every second, on the heads of 40 expressions."""


def command(*arguments: str) -> int:
    """`python run.py <arguments>` in this process; its exit code."""
    with mock.patch.object(sys, "argv", [entry.__file__, *arguments]), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ"))
        try:
            return cli.guard(entry.main)
        except SystemExit as stop:
            return int(stop.code or 0)


def tiny(results_dir: Path, *arguments: str) -> int:
    """One tiny cell, or with `-m` first several, softmax unless the arguments say otherwise; the exit code."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    others = [argument for argument in arguments if not argument.startswith("-")]
    return command(*flags, *TINY, f"results_dir={results_dir}", *others)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when training reaches the step."""
    whole = CellModule._optimise

    def dies(self: CellModule, at: int) -> None:
        if at == step:
            raise KeyboardInterrupt
        whole(self, at)

    monkeypatch.setattr(CellModule, "_optimise", dies)


def only_record(results_dir: Path) -> Record:
    """The record of the only cell below `results_dir`."""
    (path,) = Path(results_dir, "runs").rglob(FILENAME)
    record = read_record(path)
    assert record is not None
    return record


def records(results_dir: Path) -> list[Record]:
    """All records below `results_dir`; none of them may be unsound."""
    sound, problems = read_records(results_dir)
    assert not problems
    return sound
