"""`make check attention=mine`: the contract's tests of one attention alone, and one verdict."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from efficiency import row_record

from lra import contract
from lra.errors import UserError

ROOT = Path(__file__).parents[2]

TESTS = """
import pytest

@pytest.mark.parametrize("name", ["none", "none_such", "softmax"])
@pytest.mark.parametrize("size", [1, 2])
def test_sizes(name, size):
    assert (name, size) != ("softmax", 2), "two is too many"

def test_that_is_about_no_attention():
    raise RuntimeError("never runs")
"""

METHOD = '''
from attention.base import Attention
from attention.registry import register


@register("mine")
class Mine(Attention):
    """v as it is: nobody zeroes the rows of padding."""

    def attend(self, q, k, v, key_mask):
        return v
'''


@pytest.fixture
def verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Exit code and what was printed, of a check against three made-up tests and measured calls."""
    (tmp_path / "test_contract.py").write_text(TESTS)

    def of(name: str, **row) -> tuple[int, str]:
        records = [row_record(name, 256, device="CPU", **row), row_record(name, 256, device="CPU", masked=True)]
        monkeypatch.setattr(contract, "rows", lambda name: records)
        return contract.check(name, tmp_path / "test_contract.py"), capsys.readouterr().out

    return of


def test_an_attention_that_keeps_the_contract_passes_with_its_ratio(verdict) -> None:
    code, said = verdict("none", fwd_bwd_ms=0.15)
    assert code == 0
    assert "  2 passed, 0 failed\n" in said
    assert said.splitlines()[-1] == ("none: PASSED; forward + backward over exact attention's on CPU: 0.25 at N=256")


def test_one_that_does_not_fails_with_the_names_of_the_tests_and_why(verdict) -> None:
    code, said = verdict("softmax")
    assert code == 1
    assert "failed  test_sizes[2-softmax]\n          AssertionError: two is too many" in said
    assert said.splitlines()[-1] == "softmax: FAILED (1 of its tests)"


def test_a_call_that_computes_something_else_fails_too(verdict) -> None:
    code, said = verdict("none", status="wrong")
    assert code == 1
    assert said.splitlines()[-1] == "none: FAILED (1 measured calls)"


def test_no_test_at_all_is_no_pass(verdict) -> None:
    code, said = verdict("lln")
    assert code == 1
    assert said.splitlines()[-1].startswith("lln: FAILED")


def test_an_unknown_name_is_one_line_with_what_is_registered() -> None:
    with pytest.raises(UserError, match=r"^attention=nope is unknown; registered: adamra, .*softmax$"):
        contract.check("nope")


@pytest.mark.slow
def test_a_made_up_attention_is_held_to_the_contract(tmp_path: Path) -> None:
    for folder in ("lra", "attention", "kernels", "conf", "scripts", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "attention" / "mine.py").write_text(METHOD)
    (tmp_path / "conf" / "attention" / "mine.yaml").write_text("# Mine.\nname: mine\nimpl: auto\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "scripts/check.py", "mine"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 1, shown.stderr
    assert "failed  test_output_has_the_contracts_form_and_padding_never_matters[" in shown.stdout
    assert "rows of padded queries are zero" in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith("mine: FAILED (")
