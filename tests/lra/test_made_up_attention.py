"""A researcher's own attention: one file, one YAML, no other edit, and it trains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cells import TINY, only_record

from lra import launcher

ROOT = Path(launcher.RUN).parent

METHOD = '''
from torch import Tensor

from attention.base import Attention
from attention.registry import register
from kernels.common.layout import heads_last


@register("mine")
class Mine(Attention):
    """v scaled."""

    def __init__(self, num_heads, head_dim, max_length, causal=False, impl="auto", *, scale: float = 2.0):
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        self.scale = scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return heads_last(self.scale * v, key_mask)
'''


def test_one_file_and_one_yaml_make_an_attention_that_trains(tmp_path: Path, data_root: Path):
    for folder in ("lra", "attention", "kernels", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", tmp_path)
    (tmp_path / "attention" / "mine.py").write_text(METHOD)
    (tmp_path / "conf" / "attention" / "mine.yaml").write_text("# Mine.\nname: mine\nimpl: auto\nscale: 2.0\n")

    command = [sys.executable, "run.py", *TINY, "attention=mine", "attention.scale=3.0", "results_dir=results"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = subprocess.run(
        [*command, f"data.root={data_root}"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    record = only_record(tmp_path / "results")
    assert record["status"] == "ok"
    assert record["config"]["attention"] == {"name": "mine", "impl": "auto", "scale": 3.0}
