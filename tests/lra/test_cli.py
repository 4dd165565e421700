"""The command line: every mistake is one line and exit code 2, before any data is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cells import command

from lra import launcher

ROOT = Path(launcher.RUN).parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("attention=foo", "attention=foo is unknown; known: adamra"),
        ("task=foo", "task=foo is unknown; known:"),
        ("protocol=foo", "protocol=foo is unknown; known:"),
        ("budget=foo", "budget=foo is unknown; known: demo, published"),
        ("model.foo=1", "model.foo=1 is unknown: there are dim, num_layers"),
        ("foo=1", "foo=1 is unknown: there are task, attention"),
        ("+foo=1", "foo=1 is unknown: there are task, attention"),
        ("+trainer.foo=1", "trainer.foo=1 is unknown: there are accelerator, precision"),
        ("foo", "foo cannot be read; write key=value"),
        ("budget=demo model.patch=[4,", "model.patch=[4, cannot be read; write key=value, a list as 'key=[1,2]'"),
        ("attention=softmax attention.foo=1", "attention.foo=1 is unknown: attention=softmax has no options"),
        (
            "attention=mra attention=lln",
            "attention is given twice, mra and lln; use one, or `run.py -m",
        ),
        ("seed=1 seed=2", "seed is given twice, 1 and 2"),
        ("attention=adamra attention.foo=1", "attention.foo=1 is unknown: attention=adamra has the options rates"),
        ("+attention.foo=1", "attention.foo is not an option of softmax; options: none"),
        ("task.foo=1", "task.foo=1 is unknown: task=listops has the options"),
        ("seed=abc", "seed=abc is not possible; it must be an integer"),
        ("seed=-1", "seed=-1 is not possible"),
        ("seed=0,1", "Ambiguous value for argument 'seed=0,1'"),
        ("model.dim=0", "model.dim=0 is not possible; it must be greater than zero"),
        ("model.head_dim=0", "model.head_dim=0 is not possible; it must be greater than zero"),
        ("model.dropout=1", "model.dropout=1.0 is not possible; it must be in [0, 1)"),
        ("model.pooling=max", "model.pooling=max is not possible; use one of mean_full, mean_real"),
        ("model.patch=[4]", "model.patch=[4] is not possible"),
        ("model.patch=[3,5]", "model.patch=[3, 5] does not tile"),
        ("model.max_length=100", "model.max_length=100 is not possible"),
        ("model.embedding_rows=4", "model.embedding_rows=4 is not possible; task listops needs at least 16"),
        ("training.steps=0", "training.steps=0 is not possible"),
        ("training.warmup_steps=5000", "training.warmup_steps=5000 is not possible"),
        ("training.betas=[1]", "training.betas=[1.0] is not possible"),
        ("training.schedule=step", "training.schedule=step is not possible; use one of onecycle_linear, rsqrt, cosine"),
        ("trainer.precision=8", "trainer.precision=8 is not possible; use one of auto, 32, bf16"),
        ("attention=mra attention.block_size=48", "attention.block_size=48"),
        ("attention=linear attention.impl=triton", "attention.impl=triton is not available"),
        ("task.max_length=0", "task.max_length=0"),
        ("training.weight_decay=inf", "training.weight_decay=inf is not possible; it must be finite"),
        ("training.learning_rate=inf", "training.learning_rate=inf is not possible; it must be finite"),
        ("+attention.num_heads=4", "attention.num_heads=4 is not possible; the model and the task set it"),
        ("attention.name=lln", "attention.name=lln is not possible; choose with attention=<name>"),
        ("data.root=", "data.root= is not possible; it must name a folder"),
        (
            "-m hydra.launcher.foo=3",
            "hydra.launcher.foo=3 is unknown: the files of conf/hydra/launcher hold its settings",
        ),
        ("rerun=maybe", "rerun=maybe is not possible; it must be false, true or failed"),
        ("rerun=0", "rerun=0 is not possible; it must be false, true or failed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: str, message: str, tmp_path, capfd):
    results = tmp_path / "results"
    assert command(*arguments.split(), f"results_dir={results}") == 2
    written = capfd.readouterr().err
    assert written.startswith(message)
    assert written.count("\n") == 1
    assert not results.exists()


def test_cuda_without_a_device_is_a_mistake(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command("trainer.accelerator=cuda", f"results_dir={tmp_path}/results") == 2
    assert capfd.readouterr().err.startswith("trainer.accelerator=cuda is not possible; this machine shows no CUDA")


def test_kernels_without_a_device_are_a_mistake(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("kernels.common.launch.INTERPRETED", False)
    arguments = ("attention=lln", "attention.impl=triton", "trainer.accelerator=cpu")
    assert command(*arguments, f"results_dir={tmp_path}/results") == 2
    assert capfd.readouterr().err.startswith("attention.impl=triton is not possible; this cell runs on the CPU")
    assert not (tmp_path / "results").exists()


def test_a_cell_that_is_named_twice_stops_a_multirun(tmp_path, capfd):
    assert command("-m", "task=listops", "task=text", f"results_dir={tmp_path}") == 2
    assert capfd.readouterr().err.startswith("task is given twice, listops and text")


def test_results_without_a_folder_are_a_mistake(capfd):
    assert command("results_dir=", "data.root=data") == 2
    assert capfd.readouterr().err == "results_dir= is not possible; it must name a folder\n"


def test_a_multirun_checks_all_cells_before_it_starts_one(tmp_path, capfd):
    results = tmp_path / "results"
    assert command("-m", "attention=none", "model.dim=64,0", f"results_dir={results}") == 2
    assert capfd.readouterr().err == "model.dim=0 is not possible; it must be greater than zero\n"
    assert not (results / "runs").exists()


def test_a_cell_that_a_grid_names_twice_is_a_mistake(tmp_path, capfd):
    """Two processes would want one folder, though what differs changes no number."""
    results = tmp_path / "results"
    assert command("-m", "attention=none", "logger=csv,none", f"results_dir={results}") == 2
    written = capfd.readouterr().err
    assert written.startswith("none listops small published seed0 is twice in this grid: ")
    first, _, second = written.partition(" and ")
    assert "logger=csv" in first
    assert "logger=none" in second
    assert written.count("\n") == 1
    assert not (results / "runs").exists()


def test_cfg_job_shows_what_would_run_and_writes_nothing(tmp_path):
    """In a process and a folder of its own, since the command must not leave anything where it was called."""
    arguments = [sys.executable, str(ROOT / "run.py"), "attention=adamra", "task=listops", "--cfg", "job"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert "name: adamra" in shown
    assert "steps: 5000" in shown
    assert not list(tmp_path.iterdir())
