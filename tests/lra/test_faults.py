"""The fault matrix: what befalls a cell of a grid stays in that cell; the others finish and the tables are right.

The grids here are those of the launcher, with its processes, records, locks and tables; only the training inside a
cell's process is a stand-in, `CELL`. What a real cell makes of each fault is in `test_train.py`, what a cluster does to
cells in `tests/cluster/`. The README has the whole matrix.
"""

import contextlib
import io
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from cells import only_record, records, tiny
from records import record as made
from rich.console import Console

from lra import launcher, report
from lra.launcher import Job
from lra.module import CellModule
from lra.record import FILENAME, Cell
from lra.sweep.worker import Pack

ROOT = Path(__file__).parents[2]

CELL = f"""
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from filelock import FileLock, Timeout
from lra.record import lock_of, write_json

directory, record, fault = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
try:
    lock = FileLock(lock_of(directory), timeout=0)
    lock.acquire()
except Timeout:
    sys.exit("is being trained by another process")
print("begins", flush=True)
if fault == "raises":
    raise RuntimeError("on purpose")
if fault == "exits":
    sys.exit(3)
if fault == "exits as if all were well":
    sys.exit(0)
if fault == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if fault == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if fault == "writes half a record":
    directory.mkdir()
    (directory / "record.json").write_text(sys.argv[2][:200])
    os.kill(os.getpid(), signal.SIGKILL)
if fault in ("oom", "nan"):
    record = {{key: record[key] for key in ("schema", "kind", "cell", "config", "finished")}}
    record |= {{"status": fault, "message": fault}}
if fault == "takes a second":
    time.sleep(1)
write_json(directory / "record.json", record)
sys.exit(0 if record["status"] == "ok" else 1)
"""
"""A process that behaves like a cell's: it holds the lock, writes a record whole, and ends with its exit code."""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch) -> None:
    script = tmp_path / "cell.py"
    script.write_text(CELL)
    monkeypatch.setattr(launcher, "RUN", script)
    monkeypatch.setattr(launcher, "stale", lambda record, config: "")  # stand-ins have no config to tell by


def grid(results: Path, faults: dict[str, str], rerun: str = "") -> list[Job]:
    """One cell an attention, with what befalls it."""
    jobs = []
    for attention, fault in faults.items():
        whole = made(attention)
        cell = Cell.of(whole)
        config = SimpleNamespace(results_dir=results, resolved={}, rerun=rerun, afresh=False, data=None)
        overrides = [str(cell.directory(results)), json.dumps(whole), fault]
        jobs.append(Job(cell, False, overrides, config))  # type: ignore[arg-type]
    return jobs


def run(jobs: list[Job], slots: int = 2, limit_minutes: float | None = None) -> list[str]:
    """The status of every cell, as the grid saw it end."""
    console = Console(file=io.StringIO())
    return [record["status"] for record in launcher.run_jobs(jobs, [None] * slots, console, limit_minutes)]


def table(results: Path) -> dict[str, tuple[int, int]]:
    """Of every row its finished seeds and its failures."""
    rows = report.refresh(results).leaderboard
    return {row["attention"]: (row["n_seeds"], row["failures"]) for row in rows.to_dict("records")}


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("raises", "error", "the process ended with code 1"),
        ("exits", "error", "the process ended with code 3"),
        ("exits as if all were well", "error", "the process ended with code 0"),
        ("is killed", "error", "the process ended with code -9"),
        ("hangs", "timeout", "ended at its limit of"),
        ("writes half a record", "error", "the process ended with code -9"),
        ("oom", "oom", "oom"),
        ("nan", "nan", "nan"),
    ],
)
def test_a_fault_stays_in_its_cell(fault: str, status: str, message: str, tmp_path: Path, monkeypatch):
    whole = launcher._wait  # a limit for the one that hangs: the others may be slow on a busy machine
    monkeypatch.setattr(launcher, "_wait", lambda cell, limit: whole(cell, limit if cell.args[-1] == "hangs" else None))
    monkeypatch.setattr(launcher, "KILL_AFTER_SECONDS", 0.2)
    results = tmp_path / "results"
    assert run(grid(results, {"mra": "", "lln": fault, "none": ""}), limit_minutes=0.03) == ["ok", status, "ok"]
    assert {r["cell"]["attention"]: r["status"] for r in records(results)} == {"mra": "ok", "lln": status, "none": "ok"}
    (failed,) = (r for r in records(results) if r["status"] != "ok")
    assert message in failed["message"]
    assert table(results) == {"mra": (1, 0), "lln": (0, 1), "none": (1, 0)}

    before = {path: path.read_bytes() for path in results.rglob(FILENAME) if "lln" not in str(path)}
    assert run(grid(results, {"mra": "raises", "lln": "", "none": "raises"}, rerun="failed")) == ["ok"] * 3
    assert all(path.read_bytes() == content for path, content in before.items())
    assert table(results) == {"mra": (1, 0), "lln": (1, 0), "none": (1, 0)}


def test_two_grids_on_the_same_cells_train_each_once(tmp_path: Path):
    """The one that comes second says so, and leaves log and record to the first."""
    results = tmp_path / "results"
    faults = dict.fromkeys(("mra", "lln", "none"), "takes a second")
    ended: list[list[str]] = []
    grids = [threading.Thread(target=lambda: ended.append(run(grid(results, faults), slots=3))) for _ in range(2)]
    for each in grids:
        each.start()
    for each in grids:
        each.join(60)
    assert {status for statuses in ended for status in statuses} <= {"ok", "error"}
    assert all("ok" in both for both in zip(*ended, strict=True))
    assert [r["status"] for r in records(results)] == ["ok"] * 3
    assert table(results) == dict.fromkeys(faults, (1, 0))
    assert run(grid(results, dict.fromkeys(faults, "raises"))) == ["ok"] * 3


def test_a_job_comes_back_to_the_cell_that_another_sweep_trains(tmp_path: Path):
    results = tmp_path / "results"
    jobs = grid(results, {"mra": "takes a second", "lln": "", "none": ""})
    jobs[0].directory.parent.mkdir(parents=True)
    other = subprocess.Popen([sys.executable, str(launcher.RUN), *jobs[0].overrides], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"begins\n"
    jobs[0].overrides[-1] = "raises"
    assert Pack(jobs, tmp_path / "pack0.json", Path.cwd(), "digest")() == ["ok"] * 3
    assert other.wait() == 0
    assert not jobs[0].log.exists()
    assert [r["status"] for r in records(results)] == ["ok"] * 3


def test_a_disk_that_fills_up_loses_no_checkpoint(tmp_path: Path, data_root: Path, monkeypatch, capfd):
    """A real disk, of 4 MiB, full from step 5 on: neither the last checkpoint nor the record can be written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "lra-test", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    whole, filler = CellModule._optimise, disk / "filler"

    def fills(self: CellModule, step: int):
        if step == 5:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 4096)
        return whole(self, step)

    try:
        arguments = (f"data.root={data_root}", "attention=none")
        monkeypatch.setattr(CellModule, "_optimise", fills)
        assert tiny(disk / "results", *arguments) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert said.startswith("results_dir: cannot write the record to ")
        assert said.endswith("(No space left on device); the command continues the cell from its last checkpoint")
        assert not records(disk / "results")

        filler.unlink()
        monkeypatch.setattr(CellModule, "_optimise", whole)
        assert tiny(disk / "results", *arguments) == 0
        assert tiny(tmp_path / "whole", *arguments) == 0
        full, expected = only_record(disk / "results"), only_record(tmp_path / "whole")
        assert (full["test"], full["steps"]) == (expected["test"], expected["steps"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)
