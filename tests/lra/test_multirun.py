"""A grid on this machine: what is repeated, skipped, marked, ended and shown."""

import io
import json
from pathlib import Path

import pytest
from cells import records, tiny
from filelock import FileLock
from records import record as made
from rich.console import Console

from lra import launcher, overview, provenance, staleness
from lra.overview import Overview
from lra.record import FILENAME, Cell, lock_of, write_json

GRID = ("-m", "attention=none,linear")


@pytest.fixture(scope="module")
def grid(tmp_path_factory, data_root) -> Path:
    """The results of a grid of two cells, one of which did not finish: its learning rate explodes."""
    results = tmp_path_factory.mktemp("grid")
    arguments = ("-m", "attention=none", "training.learning_rate=1e-4,1e30", f"data.root={data_root}")
    assert tiny(results, *arguments) == 1
    return results


def again(grid: Path, data_root: Path, *arguments: str) -> int:
    rates = "training.learning_rate=1e-4,1e30"
    return tiny(grid, "-m", "attention=none", rates, f"data.root={data_root}", *arguments)


def change(path: Path, **values) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def found(results: Path, status: str) -> Path:
    """The only record of that status."""
    (path,) = (path for path in results.rglob(FILENAME) if json.loads(path.read_text())["status"] == status)
    return path


def test_what_finished_and_what_failed_is_not_run_again_unless_asked(grid: Path, data_root: Path, capfd, monkeypatch):
    monkeypatch.setattr(launcher, "run_job", lambda *_, **__: pytest.fail("a cell was started"))
    assert again(grid, data_root) == 1
    shown = capfd.readouterr().out
    assert "ok, finished before\n" in shown
    assert "nan, failed before; rerun=failed repeats it" in shown
    assert "1 of 2 cells ok" in shown


@pytest.mark.parametrize(("rerun", "started"), [("failed", {"nan"}), ("true", {"ok", "nan"})])
def test_rerun_repeats_the_failed_or_all(rerun: str, started: set, grid: Path, data_root: Path, monkeypatch):
    ran = set()

    def run_job(job, *_, **__):
        ran.add(job.stored["status"])
        assert f"rerun={rerun}" in map(str.lower, job.overrides)
        return job.stored

    monkeypatch.setattr(launcher, "run_job", run_job)
    assert again(grid, data_root, f"rerun={rerun}") == 1
    assert ran == started


@pytest.mark.parametrize("status", launcher.CONTINUES)
def test_a_cell_that_was_stopped_from_outside_continues_without_being_asked(
    status: str, grid: Path, data_root: Path, monkeypatch
):
    path = found(grid, "nan")
    change(path, status=status)
    ran = []
    monkeypatch.setattr(launcher, "run_job", lambda job, *_, **__: ran.append(job) or job.stored)
    try:
        again(grid, data_root)
        assert len(ran) == 1
    finally:
        change(path, status="nan")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"code": {"revision": "0123456789abcdef", "digest": "other"}}, "code changed since 0123456789ab"),
        ({"data": {"digest": "f" * 64}}, "data changed from ffffffffffff to "),
    ],
)
def test_a_finished_cell_of_other_code_or_data_is_marked_and_kept(
    changes: dict, reason: str, grid: Path, data_root: Path, capfd
):
    path = found(grid, "ok")
    before = json.loads(path.read_text())
    change(path, **changes)
    try:
        again(grid, data_root)
        shown = capfd.readouterr().out
        assert f"ok, finished before, stale ({reason}" in shown
        assert "ok, stale" in shown
        assert json.loads(path.read_text()) == before | changes
        assert tiny(grid, "attention=none", "training.learning_rate=1e-4", f"data.root={data_root}") == 0
        assert f"stale: {reason}" in capfd.readouterr().out
    finally:
        write_json(path, before)


def test_the_digest_of_the_code_follows_every_file_that_a_number_depends_on(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)

    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return provenance.code_digest()

    first = write("kernels/mra/triton.py", "a = 1")
    assert write("tests/test_a.py", "a = 1") == write("conf/hydra/launcher/slurm.yaml", "a: 1") == first
    assert write("kernels/mra/triton.py", "a = 2") != first
    assert write("kernels/mra/triton.py", "a = 1") == first
    assert write("conf/attention/mine.yaml", "name: mine") != first


def test_records_from_before_the_digest_are_not_called_stale():
    class NoConfig:
        class data:
            root = "."

    assert staleness.stale(made(), NoConfig()) == ""  # type: ignore


def test_a_cell_past_its_limit_is_ended_and_the_others_go_on(data_root: Path, tmp_path: Path, monkeypatch):
    script = tmp_path / "hangs.py"
    script.write_text("import sys, time\ntime.sleep(0 if 'attention=none' in sys.argv else 60)\nsys.exit(3)\n")
    monkeypatch.setattr(launcher, "RUN", script)
    limit = "hydra.launcher.limit_minutes=0.02"
    assert tiny(tmp_path, *GRID, limit, f"data.root={data_root}") == 1
    assert {r["cell"]["attention"]: r["status"] for r in records(tmp_path)} == {"none": "error", "linear": "timeout"}


def test_a_limit_that_is_no_time_is_a_mistake(data_root: Path, tmp_path: Path, capfd):
    assert tiny(tmp_path, *GRID, "hydra.launcher.limit_minutes=0", f"data.root={data_root}") == 2
    assert capfd.readouterr().err.startswith("hydra.launcher.limit_minutes=0 is not possible; it must be a positive")


def test_a_sweep_leaves_no_record_in_a_cell_that_another_one_trains(data_root: Path, tmp_path: Path, monkeypatch):
    """The other process writes it, and the log; also where it took the cell just after the sweep had looked."""
    monkeypatch.setattr(launcher, "RUN", tmp_path / "missing.py")
    cell = Cell("none", "listops", "small", "demo", 0)
    job = launcher.Job(cell, False, [], config=type("C", (), {"results_dir": tmp_path, "resolved": {}})())  # type: ignore
    job.directory.parent.mkdir(parents=True)
    with FileLock(lock_of(job.directory)):
        assert "is being trained by another process" in launcher.run_job(job)["message"]
        assert not job.log.exists()
        with monkeypatch.context() as just_after:
            just_after.setattr(launcher, "is_held", lambda directory: False)
            assert launcher.run_job(job)["status"] == "error"
        assert job.log.exists()
    assert not records(tmp_path)
    launcher.run_job(job)
    assert [r["status"] for r in records(tmp_path)] == ["error"]


# What is shown


def test_a_log_file_has_one_line_an_event_and_no_control_codes(tmp_path: Path):
    out = io.StringIO()
    with Overview(Console(file=out, width=80), total=3, slots=1) as shown:
        shown.skip(Cell("mra", "listops", "small", "demo", 0), "ok", "finished before")
        for seed, status in ((1, "ok"), (2, "oom")):
            cell = Cell("mra", "listops", "small", "demo", seed)
            shown.start(cell, tmp_path / "log")
            shown.finish(cell, made(status=status, message="too large" if status == "oom" else ""))
    lines = out.getvalue().splitlines()
    assert lines == [
        "[1/3] mra listops small demo seed0: ok, finished before",
        "mra listops small demo seed1: started",
        "[2/3] mra listops small demo seed1: ok (0 s), about 0 s left",
        "mra listops small demo seed2: started",
        "[3/3] mra listops small demo seed2: oom too large (0 s)",
    ]


def test_a_terminal_sees_counts_and_where_each_running_cell_is(tmp_path: Path):
    log = tmp_path / "log"
    out = Console(file=io.StringIO(), width=100, force_terminal=True)
    shown = Overview(out, total=5, slots=2)
    shown.skip(Cell("mra", "listops", "small", "demo", 0), "ok", "finished before")
    shown.skip(Cell("mra", "listops", "small", "demo", 1), "nan", "failed before")
    shown.start(Cell("lln", "listops", "small", "demo", 0), log)
    with out.capture() as capture:
        out.print(shown)
    assert "starting" in capture.get()
    log.write_text("lln listops small demo seed0: step 20/100\n")
    shown.running["lln listops small demo seed0"].started -= 60
    with out.capture() as capture:
        out.print(shown)
    log.write_text("x" * 9000 + "\nlln listops small demo seed0: step 60/100, loss 1.0\n")
    with out.capture() as capture:
        out.print(shown)
    text = capture.get()
    for part in ("1 ok", "1 failed", "1 running", "2 waiting", "lln listops small demo seed0", "60 s left"):
        assert part in text


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (99, "99 s"), (120, "2 min"), (9000, "2.5 h")])
def test_times_are_said_as_people_say_them(seconds: float, text: str):
    assert overview.duration(seconds) == text
