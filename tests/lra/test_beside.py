"""One's own rows beside committed ones: only where they compare, and nobody's seeds in another's row."""

import csv
from pathlib import Path
from typing import Any

import pytest
from efficiency import row_record
from records import record, store

from lra.beside import beside
from lra.efficiency import table
from lra.errors import UserError


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "mine", tmp_path / "h100"


def test_own_rows_stand_beside_the_other_ones_under_their_own_names(tmp_path: Path) -> None:
    mine, other = folders(tmp_path)
    store(mine, record("softmax", correct=700), record("mine", correct=800))
    store(other, record("softmax", correct=900), record("softmax", seed=1, correct=500), record("mra", correct=600))
    paths, refused = beside(mine, other)
    assert [path.name for path in paths] == ["leaderboard.csv", "summary.csv", "tables.md", "tables.tex"]
    assert paths[0].parent == mine / "with-h100"
    assert refused == []
    found = [(row["attention"], row["accuracy_mean"], row["n_seeds"]) for row in rows(paths[0])]
    assert found == [
        ("mine", "40.0", "1"),
        ("softmax", "35.0", "1"),  # not an average over the seeds of both folders
        ("softmax (h100)", "35.0", "2"),
        ("mra (h100)", "30.0", "1"),
    ]
    assert [row["attention"] for row in rows(paths[1]) if row["suite"] == "lra"] == sorted(name for name, *_ in found)
    assert "softmax (h100)" in paths[2].read_text()
    assert not (mine / "leaderboard.csv").exists()


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"device": "H100"}, "listops: device is H100, yours CPU"),
        ({"protocol": "clean"}, "listops: protocol is clean, yours small"),
        ({"digest": "other"}, "listops: data digest is other, yours digest-of-listops"),
        ({"budget": "demo", "device": "H100"}, "listops: budget is demo, yours published, device is H100, yours CPU"),
        ({"task": "text"}, "task text has no row of yours"),
    ],
)
def test_what_does_not_compare_is_refused_in_one_line_each(theirs: dict[str, Any], said: str, tmp_path: Path) -> None:
    mine, other = folders(tmp_path)
    store(mine, record("mine"))
    store(other, record("softmax", **theirs), record("mra", **theirs))
    with pytest.raises(UserError) as refusal:
        beside(mine, other)
    assert str(refusal.value).splitlines()[0] == f"{said}: 2 rows of h100 left out"
    store(other, record("lln", correct=1000))
    paths, refused = beside(mine, other)
    assert refused == [f"{said}: 2 rows of h100 left out"]
    assert [row["attention"] for row in rows(paths[0])] == ["lln (h100)", "mine"]


def test_cells_that_ran_for_their_speed_alone_have_no_accuracy_here_either(tmp_path: Path) -> None:
    mine, other = folders(tmp_path)
    store(mine, record("mine"), record("mine", budget="steps"))
    store(other, record("softmax"), record("softmax", budget="steps"))
    paths, refused = beside(mine, other)
    assert [(row["attention"], row["budget"]) for row in rows(paths[0])] == [
        ("mine", "published"),
        ("softmax (h100)", "published"),
    ]
    assert refused == []


def test_measured_calls_stand_beside_those_of_the_same_shape_on_the_same_device(tmp_path: Path) -> None:
    mine, other = folders(tmp_path)
    table.store(mine, row_record("mine", 1024))
    for length in (1024, 2048):
        table.store(other, row_record("lln", length))
    table.store(other, row_record("lln", 1024, device="A100"))
    paths, refused = beside(mine, other)
    assert [(row["attention"], row["length"]) for row in rows(paths[0])] == [("lln (h100)", "1024"), ("mine", "1024")]
    assert len(refused) == 2
    assert refused[1] == "device A100 has no row of yours: 1 rows of h100 left out"
    assert "length is 2048, yours 1024:" in refused[0]


def test_a_folder_that_is_not_there_or_holds_nothing_is_one_line(tmp_path: Path) -> None:
    mine, other = folders(tmp_path)
    store(mine, record("mine"))
    with pytest.raises(UserError, match=r"^--with .*h100 is no folder; .+$"):
        beside(mine, other)
    other.mkdir()
    with pytest.raises(UserError, match=r"^nothing of .*h100 stands beside a row of .+$"):
        beside(mine, other)
