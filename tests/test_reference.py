"""The committed tables are what their records say."""

import shutil
from pathlib import Path

import pytest

from lra import report
from lra.efficiency import table

REFERENCE = Path(__file__).parents[1] / "results" / "reference"


@pytest.mark.parametrize("results_dir", [path.parent for path in REFERENCE.glob("*/runs")], ids=lambda path: path.name)
def test_the_committed_tables_are_rebuilt_byte_for_byte(results_dir: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(results_dir, copy)
    committed = {path.name: path.read_bytes() for path in copy.glob("*.csv")}
    assert committed
    for path in copy.glob("*.csv"):
        path.unlink()
    assert not report.refresh(copy).problems
    if (copy / table.FOLDER).is_dir():
        assert not table.refresh(copy)[1]
    assert {path.name: path.read_bytes() for path in copy.glob("*.csv")} == committed
