"""One cell from start to record: finished, skipped, killed and resumed, failed in every way."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
from cells import TINY, only_record, records, stop_at, tiny
from filelock import FileLock
from lightning import Trainer

from lra import launcher
from lra.checkpoints import Checkpoints
from lra.data import DeviceSplit
from lra.lens import trained
from lra.module import CellModule
from lra.record import FILENAME, SCHEMA, problem_with

RESULT = ("test", "validation", "curve", "parameters", "steps", "data")
"""What two runs of one cell must have in common (but for the seconds in the curve)."""


def outcome(record: dict) -> dict:
    curve = [{k: v for k, v in point.items() if k != "seconds"} for point in record["curve"]]
    return {**{key: record[key] for key in RESULT}, "curve": curve}


def weights(results_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = results_dir.rglob("last.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_root) -> Path:
    """The results of one uninterrupted tiny cell."""
    results = tmp_path_factory.mktemp("finished")
    assert tiny(results, "attention=adamra", f"data.root={data_root}") == 0
    return results


def test_a_finished_cell_leaves_a_complete_record(finished: Path):
    record = only_record(finished)
    assert problem_with(record) is None
    assert record["schema"] == SCHEMA
    assert record["status"] == "ok"
    assert record["cell"] | {"overrides": None} == {
        "attention": "adamra",
        "task": "listops",
        "protocol": "small",
        "budget": "demo",
        "seed": 0,
        "overrides": None,
        "starred": True,
    }
    assert record["cell"]["overrides"]["model.max_length"] == 32
    assert record["data"]["counts"] == {"train": 40, "validation": 12, "test": 12}
    assert len(record["data"]["digest"]) == 64
    assert [point["step"] for point in record["curve"]] == [2, 4, 6]
    assert record["steps"] == 6
    assert record["impl"] == "reference"
    assert record["precision"] == "32"
    assert record["steps_per_s"] > 0
    assert record["peak_mem_mib"] > 0
    assert 0 < record["first_step_s"] < record["wall_s"]["total"]
    assert record["test"]["last"]["step"] == 6
    for where in ("best", "last"):
        assert 0 <= record["test"][where]["correct"] <= record["test"][where]["total"] == 12
    best = max(record["curve"], key=lambda point: point["validation_correct"])
    assert record["validation"]["best"]["step"] == record["test"]["best"]["step"] == best["step"]
    assert set(record["wall_s"]) == {"data", "setup", "compile", "train", "validate", "test", "total"}
    assert record["config"]["training"]["steps"] == 6


def test_the_tables_have_its_row(finished: Path):
    row = (finished / "leaderboard.csv").read_text().splitlines()[1]
    assert row.startswith("adamra+")
    assert (finished / "summary.csv").exists()


def test_only_the_results_folder_is_written(finished: Path):
    assert {path.name for path in finished.iterdir()} == {"runs", "leaderboard.csv", "summary.csv", ".tables.lock"}


def test_a_finished_cell_is_skipped_and_rerun_repeats_it(finished: Path, data_root: Path, capsys):
    before = only_record(finished)
    assert tiny(finished, "attention=adamra", f"data.root={data_root}") == 0
    assert only_record(finished) == before
    assert "accuracy" in capsys.readouterr().out
    assert tiny(finished, "attention=adamra", f"data.root={data_root}", "rerun=true") == 0
    again = only_record(finished)
    assert again["wall_s"] != before["wall_s"]
    assert outcome(again) == outcome(before)


def test_the_number_of_steps_in_a_lightning_call_changes_nothing(finished: Path, data_root: Path, tmp_path: Path):
    assert tiny(tmp_path, "attention=adamra", f"data.root={data_root}", "trainer.steps_per_call=4") == 0
    assert only_record(tmp_path)["cell"] == only_record(finished)["cell"]
    for name, weight in weights(finished).items():
        assert torch.equal(weight, weights(tmp_path)[name]), name


def test_the_bare_loop_is_timed_beside_the_run_and_changes_nothing(finished: Path, data_root: Path, tmp_path: Path):
    assert tiny(tmp_path, "attention=adamra", f"data.root={data_root}", "trainer.bare_steps=3") == 0
    record = only_record(tmp_path)
    assert record["bare_steps_per_s"] > 0
    assert (record["cell"], outcome(record)) == (only_record(finished)["cell"], outcome(only_record(finished)))


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_killed_cell_continues_to_the_same_end_bit_for_bit(
    step: int, finished: Path, data_root: Path, tmp_path: Path, monkeypatch
):
    """Killed inside an interval (3, 5), the steps since the last checkpoint run again; killed on one, none do."""
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        assert tiny(tmp_path, "attention=adamra", f"data.root={data_root}") == 130
    interrupted = only_record(tmp_path)
    assert interrupted["status"] == "interrupted"
    assert interrupted["steps"] == step
    assert list(tmp_path.rglob("last.ckpt"))

    assert tiny(tmp_path, "attention=adamra", f"data.root={data_root}") == 0
    assert outcome(only_record(tmp_path)) == outcome(only_record(finished))
    for name, weight in weights(finished).items():
        assert torch.equal(weight, weights(tmp_path)[name]), name


@pytest.mark.parametrize("stopped", [None, 3, 5])
def test_a_last_interval_that_is_shorter_is_validated_too(stopped, data_root: Path, tmp_path: Path, monkeypatch):
    """Six steps, validated at 4 and 6, whether the run is stopped on the way or not."""
    arguments = (f"data.root={data_root}", "training.validate_every=4")
    if stopped is not None:
        with monkeypatch.context() as patch:
            stop_at(stopped, patch)
            assert tiny(tmp_path, *arguments) == 130
    assert tiny(tmp_path, *arguments) == 0
    record = only_record(tmp_path)
    assert [point["step"] for point in record["curve"]] == [4, 6]
    assert record["test"]["last"]["step"] == 6


@pytest.mark.parametrize(("attention", "tolerance"), [("softmax", 1e-5), ("lln", 1e-2)])
def test_a_step_in_micro_batches_learns_the_same(attention: str, tolerance: float, data_root: Path, tmp_path: Path):
    """LLN's scales are those of a call, so its halves differ a little."""
    arguments = (f"attention={attention}", f"data.root={data_root}", "model.dropout=0.0", "training.learning_rate=1e-2")
    losses = []
    for parts in (1, 2):
        assert tiny(tmp_path / str(parts), *arguments, f"trainer.accumulate={parts}") == 0
        losses.append([point["train_loss"] for point in only_record(tmp_path / str(parts))["curve"]])
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert losses[0][-1] != pytest.approx(losses[0][0], rel=tolerance)


def test_every_item_counts_once_though_the_last_batch_is_filled_up(data_root: Path, tmp_path: Path):
    """Twelve items in batches of eight, beside the same model on all twelve at once."""
    assert tiny(tmp_path, f"data.root={data_root}") == 0
    record = only_record(tmp_path)
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    model, task = trained.load_model(checkpoint.parent, record)
    split = DeviceSplit(task.prepare(data_root, progress=False).splits["test"], torch.device("cpu"))
    tokens, labels = split.gather(torch.arange(12))
    with torch.no_grad():
        best = int((model(tokens).argmax(-1) == labels).sum())
    assert record["test"]["best"] == {"step": record["validation"]["best"]["step"], "correct": best, "total": 12}


def test_a_validation_soon_after_a_save_leaves_no_file_unless_it_is_the_best(tmp_path: Path):
    trainer, module = (
        mock.Mock(spec=Trainer),
        mock.Mock(spec=CellModule, training_config=mock.Mock(steps=5), selection="validation"),
    )
    trainer.strategy.broadcast.side_effect = lambda decision: decision
    callback = Checkpoints(tmp_path)
    saved, curve = [], []
    module.curve = curve
    trainer.save_checkpoint = lambda path: path.write_text("whole")
    for step, correct in ((1, 3), (2, 3), (3, 4), (4, 4), (5, 4)):
        module.step = step
        curve.append({"step": step, "validation_correct": correct})
        callback.on_train_epoch_end(trainer, module)
        saved.append(sorted(path.name for path in tmp_path.iterdir()))
        for path in tmp_path.iterdir():
            path.unlink()
    assert saved == [["best.ckpt", "last.ckpt"], [], ["best.ckpt", "last.ckpt"], [], ["last.ckpt"]]
    assert callback.saved_step == 5


def test_a_save_that_fails_half_way_leaves_the_old_checkpoint_and_no_litter(tmp_path: Path):
    trainer = mock.Mock(spec=Trainer)
    module = mock.Mock(spec=CellModule, training_config=mock.Mock(steps=1), step=1, selection="validation")
    trainer.strategy.broadcast.side_effect = lambda decision: decision
    module.curve = [{"step": 1, "validation_correct": 3}]
    for name in ("best.ckpt", "last.ckpt"):
        (tmp_path / name).write_text("old")

    def fills_the_disk(path: Path) -> None:
        path.write_text("ha")
        raise OSError(28, "No space left on device")

    trainer.save_checkpoint = fills_the_disk
    with pytest.raises(OSError, match="No space left"):
        Checkpoints(tmp_path).on_train_epoch_end(trainer, module)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"best.ckpt": "old", "last.ckpt": "old"}


def test_an_interrupted_cell_says_where_it_will_continue(data_root: Path, tmp_path: Path, monkeypatch):
    stop_at(1, monkeypatch)
    assert tiny(tmp_path, f"data.root={data_root}") == 130
    assert "continues from the start" in only_record(tmp_path)["message"]


def test_a_cell_whose_folder_moved_tests_the_best_checkpoint_all_the_same(
    finished: Path, data_root: Path, tmp_path: Path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert tiny(tmp_path / "before", "attention=adamra", f"data.root={data_root}") == 130
    (tmp_path / "before").rename(tmp_path / "after")
    assert tiny(tmp_path / "after", "attention=adamra", f"data.root={data_root}") == 0
    assert outcome(only_record(tmp_path / "after")) == outcome(only_record(finished))


def test_a_mistake_in_a_rerun_costs_nothing(finished: Path, data_root: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(finished, tmp_path / "copy")
    before = only_record(tmp_path / "copy")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ("attention=adamra", f"data.root={data_root}", "rerun=true", "trainer.accelerator=cuda")
    assert tiny(tmp_path / "copy", *arguments) == 2
    assert only_record(tmp_path / "copy") == before
    assert list((tmp_path / "copy").rglob("best.ckpt"))


def test_a_run_never_continues_on_other_data(data_root: Path, tmp_path: Path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert tiny(tmp_path, f"data.root={data_root}") == 130
    (path,) = tmp_path.rglob("last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["cell"]["digest"] = "0" * 64
    torch.save(checkpoint, path)
    assert tiny(tmp_path, f"data.root={data_root}") == 2
    assert "was trained on data 000000000000" in capfd.readouterr().err
    assert tiny(tmp_path, f"data.root={data_root}", "rerun=true") == 0


def test_a_damaged_checkpoint_is_named_with_the_mend(data_root: Path, tmp_path: Path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert tiny(tmp_path, f"data.root={data_root}") == 130
    (path,) = tmp_path.rglob("last.ckpt")
    path.write_bytes(path.read_bytes()[:1000])
    assert tiny(tmp_path, f"data.root={data_root}") == 2
    written = capfd.readouterr().err
    assert f"{path} is damaged" in written
    assert "rerun=true starts the cell again" in written


def test_two_processes_never_train_one_cell(finished: Path, data_root: Path, capfd):
    (folder,) = (path.parent for path in finished.rglob(FILENAME))
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        assert tiny(finished, "attention=adamra", f"data.root={data_root}", "rerun=true") == 2
    assert "is being trained by another process" in capfd.readouterr().err
    assert only_record(finished)["status"] == "ok"


def test_a_cell_killed_without_warning_continues_to_the_same_end(finished: Path, data_root: Path, tmp_path: Path):
    """SIGKILL in a process of its own, once the first checkpoint is there; a finished run counts as killed late."""
    command = [sys.executable, str(launcher.RUN), *TINY, "attention=adamra", f"results_dir={tmp_path}"]
    process = subprocess.Popen(
        [*command, f"data.root={data_root}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(tmp_path.rglob("last.ckpt")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert tiny(tmp_path, "attention=adamra", f"data.root={data_root}") == 0
    assert outcome(only_record(tmp_path)) == outcome(only_record(finished))


def test_another_seed_is_another_run_in_another_folder(finished: Path, data_root: Path, tmp_path: Path):
    assert tiny(tmp_path, "attention=adamra", f"data.root={data_root}", "seed=1") == 0
    assert only_record(tmp_path)["cell"]["seed"] == 1
    assert only_record(tmp_path)["curve"][-1]["train_loss"] != only_record(finished)["curve"][-1]["train_loss"]


def test_a_loss_that_is_not_finite_is_recorded(data_root: Path, tmp_path: Path):
    assert tiny(tmp_path, f"data.root={data_root}", "training.learning_rate=1e30") == 1
    record = only_record(tmp_path)
    assert record["status"] == "nan"
    assert "at or before step" in record["message"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "oom", "CUDA out of memory."),
        (RuntimeError("broken"), "error", "RuntimeError: broken"),
    ],
)
def test_a_failure_is_recorded_with_what_was_known(error, status, message, data_root, tmp_path, monkeypatch):
    def fails(self: CellModule, step: int) -> torch.Tensor:
        raise error

    monkeypatch.setattr(CellModule, "_optimise", fails)
    assert tiny(tmp_path, f"data.root={data_root}") == 1
    record = only_record(tmp_path)
    assert (record["status"], record["message"]) == (status, message)
    assert record["parameters"] > 0
    assert record["data"]["digest"]
    assert problem_with(record) is None


def test_a_failed_cell_runs_again_without_being_asked(data_root: Path, tmp_path: Path, monkeypatch):
    whole = CellModule._optimise
    monkeypatch.setattr(CellModule, "_optimise", lambda self, step: 1 / 0)
    assert tiny(tmp_path, f"data.root={data_root}") == 1
    monkeypatch.setattr(CellModule, "_optimise", whole)
    assert tiny(tmp_path, f"data.root={data_root}") == 0
    assert only_record(tmp_path)["status"] == "ok"


def test_a_results_folder_that_cannot_be_written_is_a_mistake(data_root: Path, tmp_path: Path, capfd):
    (tmp_path / "results").write_text("a file")
    assert tiny(tmp_path / "results", f"data.root={data_root}") == 2
    assert "results_dir: cannot write to" in capfd.readouterr().err


def test_a_full_disk_is_found_before_training(data_root: Path, tmp_path: Path, capfd, monkeypatch):
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert tiny(tmp_path, f"data.root={data_root}") == 2
    assert "No space left on device" in capfd.readouterr().err


def test_metrics_are_logged_beside_the_record(finished: Path):
    (metrics,) = finished.rglob("version_0/metrics.csv")
    table = pd.read_csv(metrics)
    assert table.dropna(subset="validation/accuracy")["step"].tolist() == [2, 4, 6]  # our steps, not Lightning's


@pytest.mark.slow
def test_wandb_runs_offline_without_a_key(data_root: Path, tmp_path: Path):
    assert tiny(tmp_path, f"data.root={data_root}", "logger=wandb") == 0
    assert list(tmp_path.rglob("wandb/offline-run-*/*.wandb"))


def test_a_multirun_runs_every_cell_in_a_process_of_its_own(data_root: Path, tmp_path: Path, capfd):
    """One of the three cells fails (its learning rate explodes); the others finish, and the exit code says so."""
    rates = "training.learning_rate=1e-4,1e30"
    assert tiny(tmp_path, "-m", "attention=none,linear", rates, f"data.root={data_root}") == 1
    statuses = sorted((r["cell"]["attention"], r["status"]) for r in records(tmp_path))
    assert statuses == [("linear", "nan"), ("linear", "ok"), ("none", "nan"), ("none", "ok")]
    shown = capfd.readouterr().out
    assert "2 of 4 cells ok" in shown
    assert len(list(tmp_path.rglob("seed0.log"))) == 4


def test_a_cell_whose_process_dies_is_recorded_by_the_launcher(data_root: Path, tmp_path: Path, monkeypatch):
    script = tmp_path / "dies.py"
    script.write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(launcher, "RUN", script)
    assert tiny(tmp_path, "-m", "attention=none", "seed=0,1", f"data.root={data_root}") == 1
    for record in records(tmp_path):
        assert record["status"] == "error"
        assert "the process ended with code -9" in record["message"]


def test_a_sound_record_is_never_replaced_by_half_of_one(finished: Path):
    (path,) = finished.rglob(FILENAME)
    assert json.loads(path.read_text())["schema"] == SCHEMA
    assert not list(finished.rglob("*.tmp"))


def test_a_cell_of_the_original_protocol_trains_and_can_report_its_last_checkpoint(tmp_path, data_root):
    small = ("model.dim=16", "model.num_layers=1", "model.num_heads=2", "model.head_dim=4", "model.ffn_dim=16")
    more = ("protocol=original", "protocol.selection=last", "training.clip_norm=0.01", "training.learning_rate=0.5")
    assert tiny(tmp_path, f"data.root={data_root}", *small, *more) == 0
    record = only_record(tmp_path)
    assert (record["selection"], record["cell"]["starred"]) == ("last", True)
    assert record["test"]["best"] == record["test"]["last"]
    assert record["test"]["best"]["step"] == 6
    assert record["validation"]["best"] == record["validation"]["last"]
    assert record["config"]["training"]["schedule"] == "rsqrt"
    (best,) = tmp_path.rglob("best.ckpt")
    assert torch.load(best, weights_only=True)["cell"]["step"] == 6
    model, _ = trained.load_model(best.parent, record)
    assert model.encoder.cls is not None
    assert model.encoder.cls.any(), "the learned token is trained"
