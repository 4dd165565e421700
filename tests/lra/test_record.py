"""A cell's directory depends on the cell alone; records are written whole and read without trust."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import record, store

from lra.record import FILENAME, Cell, overrides_hash, problem_with, read_record, read_records, write_json, write_text

quick = settings(max_examples=30, deadline=None)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


# --- identity ----------------------------------------------------------------------------------------------------


def test_directory_of_a_plain_cell_names_it() -> None:
    cell = Cell("mra", "listops", "small", "published", 3)
    assert cell.directory("results") == Path("results/runs/small/published/listops/mra/seed3")


def test_overrides_enter_the_directory_by_the_sha256_of_their_canonical_json() -> None:
    # printf '{"attention.block_size":16,"trainer.precision":"bf16"}' | sha256sum | head -c 8
    cell = Cell("mra", "text", "small", "demo", 0, {"trainer.precision": "bf16", "attention.block_size": 16})
    assert cell.directory("out") == Path("out/runs/small/demo/text/mra+a3bd4501/seed0")
    assert cell.label == "mra+a3bd4501 text small demo seed0"


@quick
@given(st.dictionaries(st.text(max_size=6), json_values, max_size=5), st.randoms())
def test_order_of_the_overrides_does_not_matter(overrides: dict, random) -> None:
    items = list(overrides.items())
    random.shuffle(items)
    assert overrides_hash(dict(items)) == overrides_hash(overrides)


@quick
@given(json_values, json_values)
def test_different_overrides_have_different_directories(one: object, other: object) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    cells = [Cell("mra", "text", "small", "demo", 0, {"key": value}) for value in (one, other)]
    assert (cells[0].directory("") == cells[1].directory("")) == same


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "mra+1f0c9e2b", "a\n", "é", None, 3])
def test_a_name_that_is_no_folder_is_refused_not_repaired(name: str) -> None:
    with pytest.raises(ValueError, match="attention="):
        Cell(name, "listops", "small", "demo", 0)


@pytest.mark.parametrize("seed", [-1, 1.0, True, "0", None])
def test_a_seed_is_a_natural_number(seed: int) -> None:
    with pytest.raises(ValueError, match="seed="):
        Cell("mra", "listops", "small", "demo", seed)


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, (1, 2), Path("x"), {1}])
def test_an_override_that_json_would_change_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"override task\.x="):
        Cell("mra", "listops", "small", "demo", 0, {"task.x": value})


def test_a_cell_survives_its_record() -> None:
    cell = Cell("mra", "listops", "small", "demo", 7, {"attention.rates": [1, 4], "model.dim": None})
    stored = json.loads(json.dumps({"cell": cell.to_dict(starred=True)}))
    assert Cell.of(stored) == cell
    assert stored["cell"]["starred"] is True
    assert len({cell, Cell.of(stored)}) == 1


# --- writing -----------------------------------------------------------------------------------------------------


def test_write_json_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "record.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 2}
    assert os.listdir(path.parent) == ["record.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"x": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_record_can_be_read_by_the_group_if_the_umask_lets_it(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "x", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"curve": [{"train_loss": math.nan}, (math.inf, 1.5)]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"curve": [{"train_loss": None}, [None, 1.5]]}


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"n": 0, "filling": "x" * 200_000})
    writer = (
        "import sys\nfrom lra.record import write_json\n"
        "for n in range(30): write_json(sys.argv[1], {'n': n, 'filling': 'x' * 200_000})"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(path)], cwd=Path(__file__).parents[2])
    reads = 0
    while process.poll() is None:
        assert len(json.loads(path.read_text())["filling"]) == 200_000
        reads += 1
    assert process.returncode == 0
    assert reads > 10


# --- reading -----------------------------------------------------------------------------------------------------


def test_sound_records_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    made = [record(seed=1), record(seed=0), record("mra", status="oom")]
    store(tmp_path, *made)
    assert read_records(tmp_path) == ([made[2], made[1], made[0]], [])


def test_an_empty_store_has_neither_records_nor_problems(tmp_path: Path) -> None:
    assert read_records(tmp_path) == ([], [])
    assert read_records(tmp_path / "missing") == ([], [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(record())[:200], "cannot be read"),
        ("", "cannot be read"),
        (b"\xff\xfe{}", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"schema": NaN}', "cannot be read: NaN"),
        ("[]", "is no JSON object"),
        (json.dumps(record(schema=2)), "schema=2 is unknown; this version reads 1"),
        (json.dumps(record(schema=True)), "schema=True is unknown"),
        (json.dumps(record(kind="lens")), "kind='lens'"),
        (json.dumps(record(status="fine")), "status='fine'"),
        (json.dumps(record(cell={"attention": "mra"})), "cell is incomplete"),
        (json.dumps(record(seed=5)), "belongs to runs/small/published/listops/softmax/seed5"),
        (json.dumps(record(test=None)), "status=ok needs test.best"),
        (json.dumps(record(data={"digest": ""})), "status=ok needs"),
        (json.dumps(record(test={"best": {"correct": 3, "total": 2}})), "test.best="),
        (json.dumps(record(test={"best": {"correct": 0, "total": 0}})), "test.best="),
        (json.dumps(record(steps_per_s="fast")), "steps_per_s='fast' is not a number"),
        ("7", "is no JSON object"),
        (json.dumps(record(status="oom") | {"device": "H100"}), "device='H100' is no JSON object"),
    ],
)
def test_what_is_no_sound_record_becomes_one_line_with_its_path(
    tmp_path: Path, content: str | bytes, said: str
) -> None:
    store(tmp_path, record(seed=1))
    path = Cell("softmax", "listops", "small", "published", 0).directory(tmp_path) / FILENAME
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    records, problems = read_records(tmp_path)
    assert records == [record(seed=1)]
    assert len(problems) == 1
    assert problems[0].startswith(f"runs/small/published/listops/softmax/seed0/{FILENAME}: {said}")
    assert "\n" not in problems[0]


def test_read_record_gives_a_sound_record_or_none(tmp_path: Path) -> None:
    path = tmp_path / FILENAME
    assert read_record(path) is None
    write_json(path, record(schema=2))
    assert read_record(path) is None
    write_json(path, record())
    assert read_record(path) == record()


@quick
@given(st.dictionaries(st.sampled_from(sorted(record())), json_values, min_size=1, max_size=4))
def test_whatever_stands_in_a_record_is_judged_without_an_exception(changes: dict) -> None:
    assert isinstance(problem_with(record() | changes), str | None)


@pytest.mark.parametrize("status", ["oom", "nan", "timeout", "error", "preempted", "interrupted"])
def test_a_failed_cell_needs_nothing_behind_its_config(status: str) -> None:
    assert problem_with(record(status=status)) is None
    assert problem_with(record(status=status, data=None, device=None, test=None, steps_per_s=None)) is None
