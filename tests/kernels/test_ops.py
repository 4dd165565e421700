"""Graphs that torch.compile kept on disk before the kernels changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.common.ops import sources_digest

KERNELS = Path(__file__).parents[2] / "kernels"
# One operator in two versions: the newer one returns a row where the older one returned a column.
COMPILED = """
import sys, torch, kernels.common.ops as ops
torch.compiler.config.cache_key_tag = sys.argv[1]
shape = (3, 1) if sys.argv[2] == "older" else (1, 3)
op = ops.register_op("turned", "(Tensor x) -> Tensor", *[lambda x: x.new_zeros(shape)] * 2)
print(tuple(torch.compile(op, fullgraph=True)(torch.zeros(3)).shape))
"""


def test_the_key_of_a_kept_graph_holds_the_digest_of_the_kernels():
    assert sources_digest(KERNELS) in torch.compiler.config.cache_key_tag


def test_digest_changes_with_the_text_and_the_name_of_a_file(tmp_path):
    (tmp_path / "lln").mkdir()
    file = tmp_path / "lln" / "ops.py"
    file.write_text("one")
    first = sources_digest(tmp_path)
    file.write_text("two")
    second = sources_digest(tmp_path)
    file.rename(tmp_path / "ops.py")
    assert len({first, second, sources_digest(tmp_path)}) == 3
    (tmp_path / "ops.pyc").write_text("compiled")
    (tmp_path / "ops.py").rename(file)
    assert sources_digest(tmp_path) == second


@pytest.mark.slow
def test_a_kept_graph_serves_the_version_it_was_made_for_and_no_other(tmp_path):
    def call(tag: str, version: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", COMPILED, tag, version]
        return subprocess.run(command, cwd=KERNELS.parent, env=environment, capture_output=True, text=True)

    assert call("1", "older").stdout == "(3, 1)\n"
    stale = call("1", "newer")
    assert "expected size" in stale.stderr, "torch knows the versions apart by itself: the tag is not needed any more"
    assert call("2", "newer").stdout == "(1, 3)\n"
