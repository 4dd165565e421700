"""The command behind `steps.csv`: a grid that compiles, then the grid that measures."""

import runpy
import subprocess
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "steps.py"))


def test_cells_compile_together_elsewhere_and_are_measured_alone(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command[2:]) or len(calls) - 1)
    assert SCRIPT["main"](["attention=none", "results_dir=mine"]) == 1
    compiling, measuring = calls
    for command in calls:
        assert {"-m", "budget=steps", "attention=none", "task=listops,text,retrieval,image,pathfinder"} <= set(command)
    assert "results_dir=mine" in measuring
    assert "results_dir=mine" not in compiling
    assert "hydra.launcher.per_gpu=7" in compiling
    assert not [argument for argument in measuring if argument.startswith(("hydra.", "training."))]
