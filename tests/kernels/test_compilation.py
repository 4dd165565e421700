"""What calls launch is found without a launch, and compiled where the launch will look for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `tests/support/ahead.py` prints, with nothing compiled before."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "support" / "ahead.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernels_of_every_attention_are_found_while_nothing_runs_them(report: dict):
    kernels = report["kernels"]
    assert {"adamra", "combiner", "lln", "mra", "routing"} <= kernels.keys()
    for name, (plain, masked) in kernels.items():
        assert len(plain) >= 5, name
        assert set(plain) <= set(masked), name


def test_what_was_compiled_ahead_is_not_compiled_again(report: dict):
    assert report["ahead"] == report["launchers"] == 1
    assert report["hits"] == [True]


def test_one_variant_serves_lengths_of_four_and_of_64_parts(report: dict):
    assert report["shared"] == 1
