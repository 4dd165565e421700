"""Every committed table, plot and page is what its records say, byte for byte."""

import importlib.metadata
import re
import shutil
from pathlib import Path

import pytest

from lra.publish import publish

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results" / "reference"
RECORDS = ("runs", "efficiency", "lens")
OUTPUTS = ("audit", "audit.csv", "test-gpu.txt")
"""What other commands than the report leave: `scripts/audit.py`, `make test-gpu`."""

PICTURES = (".png", ".svg", ".html")
DRAWN_BY = ("matplotlib", "numpy", "pillow")
"""What the bytes of a picture depend on beside its records."""


def derived(folder: Path) -> dict[str, bytes]:
    """What is neither a record, nor the output of another command, nor a lock, by name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.relative_to(folder).parts[0] not in RECORDS + OUTPUTS
    }


def drawn_elsewhere() -> list[str]:
    """The packages that draw and have another version here than where the committed pictures were drawn."""
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / ".ci" / "constraints.txt").read_text(), re.MULTILINE))
    return [name for name in DRAWN_BY if importlib.metadata.version(name) != pinned[name]]


@pytest.mark.parametrize("results_dir", [path.parent for path in REFERENCE.glob("*/runs")], ids=lambda path: path.name)
def test_what_is_committed_is_rebuilt_byte_for_byte(results_dir: Path, tmp_path: Path):
    committed = derived(results_dir)
    assert {"leaderboard.csv", "summary.csv", "tables.md", "tables.tex", "report.html"} <= committed.keys()
    copy = tmp_path / "copy"
    for name in RECORDS:
        if (results_dir / name).is_dir():
            shutil.copytree(results_dir / name, copy / name)
    assert not publish(copy).problems
    rebuilt = derived(copy)
    assert rebuilt.keys() == committed.keys()
    other = drawn_elsewhere()
    compared = [name for name in committed if not (other and name.endswith(PICTURES))]
    assert [name for name in compared if rebuilt[name] != committed[name]] == []
    if other:
        pytest.skip(f"tables are the same; plots were drawn by other versions of {', '.join(other)}")
