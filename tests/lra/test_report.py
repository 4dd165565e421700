"""Tables on disk: whole whoever writes, whatever a record holds, in any order."""

import multiprocessing
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from records import record, store, store_and_refresh
from rows import parsed, records_strategy

from lra import report
from lra.record import Cell, Record

ROOT = Path(__file__).parents[2]
quick = settings(max_examples=12, deadline=None)


@quick
@given(records_strategy, st.randoms())
def test_tables_are_byte_identical_whatever_the_order(records: list[Record], random) -> None:
    shuffled = list(records)
    random.shuffle(shuffled)
    one, other = report.build(records), report.build(shuffled)
    assert report.to_csv(one.leaderboard) == report.to_csv(other.leaderboard)
    assert report.to_csv(one.summary) == report.to_csv(other.summary)
    assert one.problems == other.problems


@quick
@given(records_strategy, st.lists(st.sampled_from([1, 1, 0, 2, "1", None, True]), min_size=25, max_size=25))
def test_records_of_unknown_schemas_are_named_and_change_no_table(records: list[Record], schemas: list) -> None:
    """Also where every record is one, and the tables are those of an empty store."""
    stored = {Cell.of(made).directory(""): made | {"schema": schema} for made, schema in zip(records, schemas)}  # noqa: B905
    known = [made for made in stored.values() if made["schema"] is not True and made["schema"] == 1]
    with tempfile.TemporaryDirectory() as folder:
        store(folder, *stored.values())
        tables, expected = report.refresh(folder), report.build(known)
    assert report.to_csv(tables.leaderboard) == report.to_csv(expected.leaderboard)
    assert report.to_csv(tables.summary) == report.to_csv(expected.summary)
    assert sum("is unknown; this version reads" in line for line in tables.problems) == len(stored) - len(known)


def test_without_records_the_tables_are_their_headers(tmp_path: Path) -> None:
    tables = report.refresh(tmp_path / "new")
    assert [len(path.read_text().splitlines()) for path in tables.paths] == [1, 1]
    assert tables.paths[0].read_text().startswith("attention,task,protocol,budget,data_digest,device,n_seeds,")
    assert tables.paths[1].read_text().startswith("attention,protocol,budget,suite,device,listops,text,")


def test_a_broken_record_is_a_problem_and_the_tables_go_on(tmp_path: Path) -> None:
    store(tmp_path, record(), record(seed=1, schema=9))
    tables = report.refresh(tmp_path)
    assert tables.leaderboard["n_seeds"].tolist() == [1]
    assert tables.problems == [
        "runs/small/published/listops/softmax/seed1/record.json: schema=9 is unknown; this version reads 1"
    ]


def test_eight_processes_that_finish_at_once_leave_whole_tables_of_all_cells(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["records", "lra.report"])  # pandas is imported once, not eight times
    together = context.Barrier(8)
    processes = [context.Process(target=store_and_refresh, args=(tmp_path, k, together)) for k in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * 8
    written = (tmp_path / "leaderboard.csv").read_bytes(), (tmp_path / "summary.csv").read_bytes()
    assert parsed(written[0].decode())[0]["seeds"] == "0 1 2 3 4 5 6 7"
    tables = report.refresh(tmp_path)
    assert written == (tables.paths[0].read_bytes(), tables.paths[1].read_bytes())
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_refresh_waits_for_its_turn_and_reads_after_it(tmp_path: Path) -> None:
    store(tmp_path, record(seed=0))
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / ".tables.lock"):
            refreshing = pool.submit(report.refresh, tmp_path)
            with pytest.raises(TimeoutError):
                refreshing.result(timeout=0.5)
            store(tmp_path, record(seed=1))
        assert refreshing.result(timeout=60).leaderboard["n_seeds"].tolist() == [2]


def test_the_script_rebuilds_says_where_and_names_problems(tmp_path: Path) -> None:
    store(tmp_path, record(), record(seed=1, schema=9))
    command = [sys.executable, "scripts/report.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"{tmp_path / 'leaderboard.csv'}: 1 rows" in done.stdout
    assert "schema=9 is unknown" in done.stderr
    missing = subprocess.run(
        [*command[:2], str(tmp_path / "no")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].endswith("is no folder; name the one that holds runs/")
