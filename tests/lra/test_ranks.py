"""One cell on several devices learns what it learns on one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cells import TINY, only_record, tiny
from torch import distributed, nn

from lra import launcher
from lra.ranks import average_gradients, rank_of_process


def test_gradients_become_their_mean_over_the_ranks_in_one_call(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[1].bias.requires_grad_(False)
    model(torch.ones(1, 3)).sum().backward()
    mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    calls = []

    def all_reduce(flat: torch.Tensor) -> None:  # the other rank's gradients are three times as large
        calls.append(flat.numel())
        flat.mul_(4)

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    average_gradients(model.parameters())
    assert calls == [6 + 2 + 2]
    for parameter, gradient in zip(model.parameters(), mine, strict=False):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    assert model[1].bias.grad is None


def test_a_single_process_keeps_its_gradients():
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    gradient = model.weight.grad
    average_gradients(model.parameters())
    assert model.weight.grad is gradient


def test_only_a_cell_on_several_devices_takes_its_rank_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (rank_of_process(1), rank_of_process(4)) == (0, 3)
    monkeypatch.delenv("LOCAL_RANK")
    assert rank_of_process(4) == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("trainer.devices=3",), "trainer.devices=3 is not possible; it must divide training.batch_size=8"),
        (("trainer.devices=0",), "trainer.devices=0 is not possible; it must be greater than zero"),
        (("trainer.devices=4", "trainer.accumulate=4"), "times accumulate=4"),
    ],
)
def test_every_device_needs_an_equal_part_of_the_batch(arguments, line: str, tmp_path: Path, capfd):
    assert tiny(tmp_path, *arguments) == 2
    assert line in capfd.readouterr().err


def test_more_devices_than_there_are_is_a_mistake(tmp_path: Path, data_root: Path, capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    arguments = ("trainer.devices=2", "trainer.accelerator=cuda", f"data.root={data_root}")
    assert tiny(tmp_path, *arguments) == 2
    assert "trainer.devices=2 is not possible; this machine shows 1 CUDA devices" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_rank_ends_with_a_killed_rank_0():
    """Of two children of a killed process the one that asked for it is gone, the other is not."""
    helper = "import sys, time; from lra.ranks import end_with_parent; {} print('ready', flush=True); time.sleep(60)"
    asked, other = ([sys.executable, "-c", helper.format(call)] for call in ("end_with_parent();", ""))
    starter = f"import subprocess, time; a, b = (subprocess.Popen(c) for c in ({asked!r}, {other!r})); "
    starter += "print('children', a.pid, b.pid, flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True, cwd=launcher.RUN.parent
    ) as first:
        said = [first.stdout.readline() for _ in range(3)]
        first.kill()
    pids = next([int(pid) for pid in line.split()[1:]] for line in said if line.startswith("children"))
    try:
        deadline = time.monotonic() + 20
        while _lives(pids[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [_lives(pid) for pid in pids] == [False, True]
    finally:
        os.kill(pids[1], signal.SIGKILL)


def _lives(pid: int) -> bool:
    """Whether a process runs; one that only waits to be read off does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_grid_gives_every_cell_as_many_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert launcher._slots(1) == ["0", "1", "2", "3", "4"]
    assert launcher._slots(2, devices=2) == ["0,1", "2,3", "0,1", "2,3"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", [["attention=softmax"], ["attention=routing", "attention.init=paper"]])
def test_two_processes_learn_what_one_does(attention: list[str], data_root: Path, tmp_path: Path):
    """The batch, the losses and counts that are read, and Routing's centroids are those of one process."""
    arguments = (*attention, "model.dropout=0.0", "training.learning_rate=1e-2", "logger=none")
    assert tiny(tmp_path / "one", *arguments, f"data.root={data_root}") == 0
    command = [sys.executable, str(launcher.RUN), *TINY, *arguments, f"data.root={data_root}"]
    command += [f"results_dir={tmp_path / 'two'}", "trainer.devices=2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    one, two = (only_record(tmp_path / name) for name in ("one", "two"))
    assert (one["device"]["count"], two["device"]["count"]) == (1, 2)
    keys = ("train_loss", "validation_loss", "validation_correct")
    for mine, other in zip(two["curve"], one["curve"], strict=True):
        assert [mine[key] for key in keys] == pytest.approx([other[key] for key in keys], rel=1e-4)
    assert two["test"] == one["test"]
    weights = [
        torch.load(next((tmp_path / name).rglob("last.ckpt")), weights_only=True)["state_dict"]
        for name in ("one", "two")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)
