"""A cell that more than one process trains: what the later ones may go on with, and what its record then says."""

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cells import only_record, stop_at, tiny
from lightning import Trainer

from lra import predictions, provenance, train
from lra.checkpoints import Checkpoints
from lra.module import CellModule
from lra.record import FILENAME

CELL = ("attention=none", "trainer.precision=auto")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data_root: Path) -> Path:
    """The results of a cell that was stopped before its last step, with a checkpoint of step 2 or 4."""
    results = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(5, patch)
        assert tiny(results, *CELL, f"data.root={data_root}") == 130
    return results


def continued(stopped: Path, results: Path, data_root: Path, **changed: Any) -> int:
    """Continue a copy of the stopped cell whose checkpoint has other values; the exit code."""
    shutil.copytree(stopped, results, dirs_exist_ok=True)
    (path,) = results.rglob("last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["cell"] |= changed
    torch.save(checkpoint, path)
    return tiny(results, *CELL, f"data.root={data_root}")


def test_speed_and_memory_of_another_device_are_not_counted(stopped: Path, data_root: Path, tmp_path: Path):
    fast = {"timed_steps": 10**9, "timed_seconds": 1.0, "peak_mem_mib": 1e6}
    there = {"name": "NVIDIA H100", "count": 1, "sharing": 1, "driver": "570"}
    assert continued(stopped, tmp_path / "same", data_root, **fast) == 0
    assert continued(stopped, tmp_path / "other", data_root, **fast, device=there) == 0
    same, other = only_record(tmp_path / "same"), only_record(tmp_path / "other")
    assert same["steps_per_s"] > 1e8
    assert same["peak_mem_mib"] == 1e6
    assert other["device"] == same["device"]
    assert 0 < other["steps_per_s"] < 1e5
    assert 0 < other["peak_mem_mib"] < 1e6
    assert other["test"] == same["test"]
    assert same["processes"] == other["processes"] == 2


def test_a_cell_has_one_precision_and_one_implementation(stopped: Path, data_root: Path, tmp_path: Path, capfd):
    there = {"computed_by": "triton in bf16", "device": {"name": "NVIDIA H100"}}
    assert continued(stopped, tmp_path, data_root, **there) == 2
    written = capfd.readouterr().err
    assert "was computed by triton in bf16, here it would be by reference in 32; continue it on NVIDIA H100" in written
    assert "rerun=true starts the cell again" in written


def test_every_version_of_the_code_that_trained_a_cell_is_named(stopped: Path, data_root: Path, tmp_path: Path, capfd):
    now = provenance.code_digest()
    assert only_record(stopped)["code"]["trained_by"] == [now]
    assert continued(stopped, tmp_path, data_root, codes=["0123456789ab"]) == 0
    assert only_record(tmp_path)["code"]["trained_by"] == ["0123456789ab", now]
    assert "stale: code changed while it was trained; rerun=true repeats it" in capfd.readouterr().out


def test_a_checkpoint_of_an_earlier_version_is_continued(stopped: Path, data_root: Path, tmp_path: Path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.rglob("last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    known = ("digest", "step", "curve", "train_seconds", "timed_steps", "timed_seconds")
    checkpoint["cell"] = {key: checkpoint["cell"][key] for key in known}
    torch.save(checkpoint, path)
    assert tiny(tmp_path, *CELL, f"data.root={data_root}") == 0
    assert only_record(tmp_path)["processes"] == 2


def test_a_cell_that_fails_after_its_training_keeps_what_was_measured(
    stopped: Path, data_root: Path, tmp_path: Path, monkeypatch
):
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "write", fails)
        assert continued(stopped, tmp_path, data_root) == 1
    assert tiny(tmp_path, *CELL, f"data.root={data_root}") == 0
    record = only_record(tmp_path)
    assert record["processes"] == 3
    assert record["peak_mem_mib"] > 0
    assert record["steps_per_s"] > 0
    assert "first_step_s" not in record  # nothing was trained


def saves(folder: Path, step: int, correct: int, content: str) -> None:
    """A validation of a run that has seen two right answers before, and its checkpoint; a second save would fail."""
    contents = iter([content])

    def save(path: Path) -> None:
        path.write_text(next(contents))

    trainer = mock.Mock(spec=Trainer, save_checkpoint=save)
    trainer.strategy.broadcast.side_effect = lambda decision: decision
    curve = [{"step": 1, "validation_correct": 2}, {"step": step, "validation_correct": correct}]
    module = mock.Mock(spec=CellModule, training_config=mock.Mock(steps=9), selection="validation", step=step)
    module.curve = curve
    Checkpoints(folder).on_train_epoch_end(trainer, module)


def test_the_best_checkpoint_never_runs_ahead_of_the_last(tmp_path: Path):
    """One save makes both: a disk cannot fill up between them."""
    saves(tmp_path, 2, 3, "two")
    saves(tmp_path, 3, 1, "three")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"best.ckpt": "two", "last.ckpt": "three"}


def test_what_a_killed_process_left_half_done_is_not_written_into(tmp_path: Path):
    """Killed after it had named the best, before the last: the file that it wrote has two names."""
    (tmp_path / "best.ckpt").write_text("two")
    (tmp_path / ".last.ckpt.tmp").hardlink_to(tmp_path / "best.ckpt")
    saves(tmp_path, 3, 1, "three")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"best.ckpt": "two", "last.ckpt": "three"}


def test_a_cell_that_another_process_finishes_meanwhile_keeps_its_record(
    stopped: Path, data_root: Path, tmp_path: Path, monkeypatch
):
    assert continued(stopped, tmp_path, data_root) == 0
    (path,) = tmp_path.rglob(FILENAME)
    record, held = path.read_text(), train._held
    path.unlink()

    def finishes(directory: Path, label: str):
        path.write_text(record)
        return held(directory, label)

    monkeypatch.setattr(train, "_held", finishes)
    assert tiny(tmp_path, *CELL, f"data.root={data_root}") == 0
    assert path.read_text() == record
