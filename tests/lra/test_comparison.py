"""What a cell answers is kept, and two rows are compared on the same items or not at all."""

import runpy
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import only_record, tiny
from records import record, store
from scipy.stats import binomtest, chi2

from lra import predictions, stats, tasks
from lra.comparison import compare
from lra.errors import UserError
from lra.model import Classifier
from lra.module import objective
from lra.predictions import FILENAME, Predictions
from lra.record import Cell, Record

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"
ITEMS = 40

# --- McNemar's test ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (0, 6), (6, 16), (16, 6), (10, 10), (12, 12), (24, 0)])
def test_few_discordant_items_are_judged_exactly(first: int, second: int) -> None:
    n, low = first + second, min(first, second)
    exact = min(Fraction(1), 2 * sum((Fraction(comb(n, k), 2**n) for k in range(low + 1)), Fraction(0)))
    p, test = stats.mcnemar(first, second)
    assert test == "exact"
    assert p == pytest.approx(float(exact), rel=1e-12)
    assert p == pytest.approx(binomtest(low, n).pvalue if n else 1.0, rel=1e-12)


def test_many_discordant_items_are_judged_by_chi_squared_with_continuity_correction() -> None:
    p, test = stats.mcnemar(121, 59)
    assert test == "chi2"
    assert p == pytest.approx(chi2.sf(61**2 / 180, 1), rel=1e-12)  # (|121 - 59| - 1)² / 180 = 20.67
    assert p == pytest.approx(5.4e-6, rel=0.01)
    assert stats.mcnemar(59, 121) == (p, test)
    assert stats.mcnemar(100, 100) == (1.0, "chi2")


@pytest.mark.parametrize("first", [5, 8, 12, 20])
def test_both_forms_agree_where_one_gives_way_to_the_other(first: int) -> None:
    n = stats.FEW_DISCORDANT
    p, test = stats.mcnemar(first, n - first)
    assert test == "chi2"
    assert p == pytest.approx(binomtest(first, n).pvalue, abs=0.01)


# --- predictions of a cell ---------------------------------------------------------------------------------------


def test_a_cell_keeps_one_answer_to_every_item_in_the_order_of_the_split(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve items in batches of eight, each taken for its place in the batch: those that fill up the last batch, the
    first four at places 4 to 7, must not answer twice."""

    def places(model: Classifier, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        losses, auxiliary, _ = objective(model, tokens, labels)
        return losses, auxiliary, torch.arange(len(labels))

    monkeypatch.setattr("lra.module.objective", places)
    assert tiny(tmp_path, "attention=none", f"data.root={data_root}") == 0
    made = only_record(tmp_path)
    kept = predictions.read(tmp_path, made)  # which holds them against the integers of the record
    assert kept.best.tolist() == kept.last.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    task = tasks.build(**made["config"]["task"])
    assert kept.labels.tolist() == task.prepare(data_root, progress=False).splits["test"].labels.tolist()
    assert {array.dtype for array in vars(kept).values()} == {np.dtype("uint8")}


def test_the_file_is_small_and_depends_on_the_predictions_alone(tmp_path: Path) -> None:
    some = np.random.default_rng(0).integers(0, 10, 2000)
    contents = []
    for folder in ("one", "other"):
        predictions.write(tmp_path / folder, Predictions(some, some[::-1], some))
        contents.append((tmp_path / folder / FILENAME).read_bytes())
    assert contents[0] == contents[1]
    assert len(contents[0]) < 5000


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: predictions.write(path.parent, answers(31)), "does not belong to the record"),
        (lambda path: predictions.write(path.parent, answers(30, items=ITEMS + 1)), "does not belong to the record"),
    ],
)
def test_predictions_that_are_not_those_of_the_record_are_refused(spoil: Any, said: str, tmp_path: Path) -> None:
    made = cell(tmp_path, "softmax", right=range(30))
    spoil(Cell.of(made).directory(tmp_path) / FILENAME)
    with pytest.raises(UserError, match=said) as refusal:
        predictions.read(tmp_path, made)
    assert "\n" not in str(refusal.value)


def answers(right: int, items: int = ITEMS) -> Predictions:
    labels = np.arange(items) % 3
    best = np.where(np.arange(items) < right, labels, labels + 1)
    return Predictions(labels, best, labels + 1)


def cell(results_dir: Path, attention: str, *, right: Any, labels: Any = None, **about: Any) -> Record:
    """A stored cell that gets the items `right` right, and at its last step none."""
    labels = np.arange(ITEMS) % 3 if labels is None else labels
    best = np.array([label if item in right else label + 1 for item, label in enumerate(labels)])
    made = record(attention, correct=len(set(right)), total=ITEMS, **about)
    made["test"]["last"]["correct"] = 0
    store(results_dir, made)
    predictions.write(Cell.of(made).directory(results_dir), Predictions(labels, best, labels + 1))
    return made


# --- two rows ----------------------------------------------------------------------------------------------------


def test_rows_are_paired_seed_by_seed_with_hand_computed_numbers(tmp_path: Path) -> None:
    made = [
        cell(tmp_path, "adamra", right=range(30), seed=0),
        cell(tmp_path, "softmax", right=range(10, 32), seed=0),
        cell(tmp_path, "adamra", right=range(20), seed=1),
        cell(tmp_path, "softmax", right=range(20), seed=1),
        cell(tmp_path, "softmax", right=range(20), seed=2),
        cell(tmp_path, "mra", right=range(5), seed=0),
    ]
    (comparison,) = compare(tmp_path, made, "adamra", "softmax")
    first, second = comparison.pairs
    assert (first.seed, first.items, first.first, first.second) == (0, 40, 75.0, 55.0)
    assert (first.only_first, first.only_second, first.difference, first.test) == (10, 2, 20.0, "exact")
    assert first.p == pytest.approx(2 * 79 / 4096)  # 1 + 12 + 66 of 2¹²
    assert (second.only_first, second.only_second, second.p) == (0, 0, 1.0)
    assert comparison.left_out == ["listops: seed 2 is left out: adamra has no finished cell of it"]
    shown = str(comparison).splitlines()
    assert shown[0] == "listops, protocol small, budget published, data digest-of-li, CPU"
    assert shown[2].split() == ["0", "40", "75.00", "55.00", "+20.00", "10", "2", "0.0386", "exact"]
    assert shown[4].startswith("mean difference +10.00 points over 2 seeds, 95 % interval -117.06 to +137.06")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"protocol": "clean"}, "protocol is small and clean"),
        ({"budget": "demo"}, "budget is published and demo"),
        ({"digest": "another"}, "data digest is digest-of-listops and another"),
        ({"device": "H100"}, "device is CPU and H100"),
        ({"task": "text"}, "have no finished cell of the same task"),
    ],
)
def test_what_does_not_compare_is_refused_in_one_line(other: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = [cell(tmp_path, "adamra", right=[1]), cell(tmp_path, "softmax", right=[1], **other)]
    with pytest.raises(UserError, match=said) as refusal:
        compare(tmp_path, made, "adamra", "softmax")
    assert "\n" not in str(refusal.value)


def test_other_test_items_under_the_same_digest_are_refused(tmp_path: Path) -> None:
    made = [cell(tmp_path, "adamra", right=[1]), cell(tmp_path, "softmax", right=[1], labels=np.arange(ITEMS) % 2)]
    with pytest.raises(UserError, match="seed 0 is left out: the test items differ"):
        compare(tmp_path, made, "adamra", "softmax")


def test_the_script_prints_the_table_and_says_what_is_not_there(tmp_path: Path, capsys, monkeypatch) -> None:
    cell(tmp_path, "adamra", right=range(30))
    cell(tmp_path, "softmax", right=range(10, 32))
    cell(tmp_path, "mra", right=[1], task="text")

    def said(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    code, out, _ = said("--compare", "adamra,softmax")
    assert code == 0
    assert "75.00" in out
    assert not (tmp_path / "leaderboard.csv").exists()
    code, _, err = said("--compare", "adamra,lln", "--task", "listops")
    assert (code, err) == (2, "lln has no finished cell of task=listops; there are adamra, softmax\n")
    code, _, err = said("--compare", "adamra,adamra")
    assert code == 2
    assert "name two rows" in err
