"""`make sweep`: the grid that it names, small enough for two cores."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lra import config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cells() -> list[config.Config]:
    """What the target's command composes, cell by cell."""
    shown = subprocess.run(["make", "-n", "sweep"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = re.search(r"run\.py -m ((?:[^;\\]|\\\n)+);", shown)
    assert found is not None, shown
    axes = [argument.partition("=") for argument in shlex.split(found[1].replace("\\\n", " "))]
    grid = itertools.product(*([f"{key}={value}" for value in values.split(",")] for key, _, values in axes))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return [config.load(compose("config", overrides=list(overrides))) for overrides in grid]


def test_it_is_three_attentions_on_two_tasks_with_two_seeds(cells: list[config.Config]) -> None:
    named = {(cell.attention["name"], cell.task["name"], cell.seed) for cell in cells}
    assert named == set(itertools.product(("softmax", "adamra", "lln"), ("listops", "pathfinder"), (0, 1)))
    assert len(cells) == 12
    assert {cell.results_dir for cell in cells} == {"results/sweep"}


def test_its_cells_are_the_protocols_model_on_few_items_for_few_steps(cells: list[config.Config]) -> None:
    for cell in cells:
        assert (cell.budget.name, cell.protocol.name) == ("sweep", "small")
        assert cell.training.steps * cell.training.batch_size <= 480
        assert cell.training.steps // cell.training.validate_every == 4  # points of a learning curve
        assert cell.task["validation_size"] * 4 + cell.task["test_size"] * 2 <= 1100
        assert cell.model.max_length == {"listops": 2048, "pathfinder": 1024}[cell.task["name"]]


def test_the_tables_are_made_though_a_cell_failed() -> None:
    shown = subprocess.run(["make", "-n", "sweep"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "code=$?; .venv/bin/python scripts/report.py results/sweep && exit $code" in shown
