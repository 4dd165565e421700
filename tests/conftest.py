"""Fixtures that several files use."""

import os
from pathlib import Path

import pytest
import torch

# Deterministic matrix products on CUDA need it, and torch looks once in a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. Triton settles it when the first one is defined, in whichever test file.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data folder for all tiny cells of a test process, so that the expressions are made once."""
    return tmp_path_factory.mktemp("data")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names what ran on a real SLURM, so that a log shows that it did."""
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and "/cluster/" in report.nodeid:
            name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
            terminalreporter.write_line(f"on a real SLURM: {name} ({report.duration:.0f} s)")
