"""The command behind `steps.csv`: a grid that compiles, then the grid that measures."""

import runpy
import subprocess
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "steps.py"))


def test_cells_compile_together_elsewhere_and_are_measured_alone(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command[2:]) or len(calls) - 1)
    assert SCRIPT["main"](["attention=none", "results_dir=mine"]) == 1
    compiling, measuring = calls
    for command in calls:
        assert {"-m", "budget=steps", "attention=none", "task=listops,text,retrieval,image,pathfinder"} <= set(command)
    assert "results_dir=mine" in measuring
    assert "results_dir=mine" not in compiling
    assert "hydra.launcher.per_gpu=7" in compiling
    assert not [argument for argument in measuring if argument.startswith(("hydra.", "training."))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lln"], "lln is not key=value"),
        ([], "scripts/steps.py times cells on a GPU; this machine"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(subprocess, "call", lambda command: pytest.fail("started"))
    assert SCRIPT["main"](arguments) == 2
    written = capsys.readouterr().err
    assert written.startswith(message)
    assert written.count("\n") == 1


def test_a_grid_that_was_refused_is_not_started_again(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 2)
    assert SCRIPT["main"](["attention=foo"]) == 2
    assert len(calls) == 1
