"""Sweeps on a real SLURM: what its queue, its signals, its limits and its requeue do to cells.

All of it is skipped where SLURM cannot run; `tests/lra/test_sweep.py` tests the same code against shell scripts. A cell
that has to be in the middle of its training when something happens is stopped there (SIGSTOP), so that no test depends
on how fast the machine is; whatever SLURM does to a job wakes it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cells import records, tiny
from sweeps import look, submission, submit, until

from lra import provenance
from lra.record import Record
from lra.sweep import manifest, states
from lra.sweep import submission as sending

SMALL = ("attention=none", "hydra.launcher.memory_gb=1", "hydra.launcher.cpus=1")
LONG = (*SMALL, "training.steps=200", "training.validate_every=10")
"""A second of training or more, with a checkpoint soon."""


class Watched:
    """The sweep `one` of a results folder, seen from outside."""

    def __init__(self, results: Path, cluster):
        self.results, self.cluster = results, cluster

    @property
    def states(self) -> dict[int, str]:
        """How each cell stands, by its seed."""
        return {state.entry.cell.seed: state.what for state in states.of(manifest.read(self.results, "one"))}

    @property
    def details(self) -> dict[int, str]:
        return {state.entry.cell.seed: state.detail for state in states.of(manifest.read(self.results, "one"))}

    @property
    def job(self) -> str:
        """The last job that was submitted."""
        return manifest.read(self.results, "one").jobs[-1]

    def pack(self, k: int = 0) -> dict:
        """What the job of a pack says of itself; empty before it runs."""
        return states._pack_file(manifest.read(self.results, "one"), k)

    def freeze(self, seed: int = 0) -> None:
        """Stop the process of a cell where it is, once it has a checkpoint."""
        self.until(lambda: list(self.results.rglob(f"seed{seed}/last.ckpt")))
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        """To the process of the cell that runs."""
        pack = self.pack()["pid"]
        (cell,) = Path(f"/proc/{pack}/task/{pack}/children").read_text().split()
        os.kill(int(cell), number)

    def until(self, condition) -> None:
        until(condition, 300, self.said)

    def until_over(self) -> None:
        self.until(lambda: not set(self.states.values()) & set(states.ALIVE))

    def said(self) -> str:
        """What jobs and cells have printed, for a test that fails."""
        jobs, logs = (self.results / "sweeps").rglob("*_log.*"), self.results.rglob("seed*.log")
        queue = self.cluster.ask("squeue", "--all", "--states=all") + "\n" + self.cluster.said()
        return queue + "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in [*jobs, *logs])


@pytest.fixture
def watched(slurm, tmp_path: Path) -> Watched:
    return Watched(tmp_path, slurm)


def metrics(record: Record) -> list:
    return [record["test"], record["validation"], record["steps"], [point["train_loss"] for point in record["curve"]]]


def test_a_grid_of_four_cells_waits_and_ends_well(watched: Watched, data_root: Path, capfd, monkeypatch):
    monkeypatch.setattr(sending, "SECONDS_BETWEEN_LOOKS", 0.5)
    grid = ("-m", *SMALL, "seed=0,1,2,3", "hydra/launcher=slurm", "hydra.launcher.cells_per_job=2")
    fixed = ("hydra.launcher.gpus=0", "hydra.launcher.name=one", f"data.root={data_root}")
    assert tiny(watched.results, *grid, *fixed) == 0, watched.said()
    assert "sweep one: 4 ok" in capfd.readouterr().out
    assert len(records(watched.results)) == 4
    assert [watched.pack(k)["ended"] for k in (0, 1)] == [{"0": "ok", "1": "ok"}] * 2


def test_scancel_is_recorded_and_retry_continues(watched: Watched, slurm, data_root: Path, capfd):
    """The shell that submitted has ended long before."""
    script = str(provenance.REPOSITORY / "scripts" / "sweep.py")
    arguments = submission(watched.results, data_root, *LONG, "seed=0,1", "hydra.launcher.cells_per_job=2")
    subprocess.run([sys.executable, script, *arguments], check=True, start_new_session=True, timeout=120)
    watched.freeze()
    assert watched.states == {0: "running", 1: "queued"}
    slurm.ask("scancel", watched.job)
    watched.until_over()
    assert watched.states == {0: "interrupted", 1: "lost"}, watched.said()
    assert "stopped before this cell began" in watched.details[1]
    assert [record["cell"]["seed"] for record in records(watched.results)] == [0]
    assert look(watched.results, "collect") == 1

    assert look(watched.results, "retry") == 0
    watched.until_over()
    assert look(watched.results, "collect") == 0, watched.said()
    assert "sweep one: 2 ok" in capfd.readouterr().out


def test_a_time_limit_requeues_the_job_and_the_cell_ends_with_the_same_metrics(
    watched: Watched, slurm, data_root: Path, tmp_path_factory
):
    whole = tmp_path_factory.mktemp("whole")
    assert tiny(whole, "attention=none", *LONG[-2:], f"data.root={data_root}") == 0
    assert submit(watched.results, data_root, *LONG) == 0
    watched.freeze()
    slurm.limit(watched.job, minutes=1)
    watched.until(lambda: "Restarts=1" in slurm.ask("scontrol", "show", "job", watched.job))
    slurm.limit(watched.job, minutes=60)  # or SLURM warns of its end again before Python has started
    watched.until_over()
    assert watched.states == {0: "ok"}, watched.said()
    assert watched.pack()["starts"] == 2
    (limited,), (expected,) = records(watched.results), records(whole)
    assert metrics(limited) == metrics(expected)


def test_a_job_survives_its_nodes_daemon_and_is_requeued_where_the_node_fails(watched: Watched, slurm, data_root: Path):
    """When the node falls silent the cell still trains there and holds its lock; SLURM starts the job a second time."""
    assert submit(watched.results, data_root, *LONG) == 0
    watched.freeze()
    slurm.stop_node()
    assert watched.states == {0: "running"}
    slurm.start_node()
    assert watched.states == {0: "running"}
    assert watched.pack()["starts"] == 1
    watched.signal(0)  # the cell is still there

    slurm.stop_node()
    slurm.ask("scontrol", "update", f"NodeName={slurm.host}", "State=DOWN", "Reason=test")
    assert watched.states == {0: "queued"}
    slurm.start_node()
    watched.until_over()
    assert watched.states == {0: "ok"}, watched.said()
    assert watched.pack()["starts"] == 2


def test_a_job_that_is_preempted_makes_room_and_comes_back(watched: Watched, slurm, data_root: Path):
    """SLURM warns it, and would count it as completed if it just ended within its grace time."""
    assert submit(watched.results, data_root, *LONG) == 0
    watched.freeze()
    asked = time.monotonic()
    every_core = ("--partition=urgent", "--exclusive", "--mem=0", "--immediate=100")
    assert slurm.ask("srun", *every_core, "echo", "there was room", seconds=120) == "there was room", watched.said()
    assert time.monotonic() - asked < 55, "the job stayed until its grace time was over"
    watched.until_over()
    assert watched.states == {0: "ok"}, watched.said()
    assert watched.pack()["starts"] == 2
