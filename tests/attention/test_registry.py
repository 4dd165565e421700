"""A method is one file and one YAML; wrong names end in one clear line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attention
from attention import registry
from attention.base import Attention

ROOT = Path(__file__).parents[2]
SIZES = {"num_heads": 2, "head_dim": 8, "max_length": 64}

MINE = '''"""A made-up attention: every real query gets `gain` times the mean of the real values."""

import torch

from attention.base import Attention
from attention.registry import register
from kernels.common.layout import compute_dtype, heads_last


@register("mine", mine_loud={"gain": 3.0})
class Mine(Attention):
    """gain · mean(v)"""

    def __init__(self, num_heads, head_dim, max_length, causal=False, impl="auto", gain: float = 1.0):
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        if causal:
            raise ValueError("attention.causal=True has no form here: the mean sees the future")
        self.gain = gain

    def attend(self, q, k, v, key_mask):
        real = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
        values = v.to(compute_dtype(v.dtype)).masked_fill(~real[:, None, :, None], 0.0)
        count = real.sum(-1)[:, None, None, None].clamp(min=1)
        mean = self.gain * values.sum(2, keepdim=True) / count
        return heads_last(mean.expand(v.shape), key_mask, v.dtype)
'''


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.names()  # everything discovered before the copy
    monkeypatch.setattr(registry.attentions, "entries", dict(registry.attentions.entries))


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^attention=sofmax is unknown; known: .*\bnone, .*\bsoftmax.*$"):
        attention.build("sofmax", **SIZES)
    with pytest.raises(ValueError, match=r"^attention=sofmax is unknown"):
        attention.options("sofmax")


def test_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^attention\.block is not an option of softmax; options: none$"):
        attention.build("softmax", **SIZES, block=3)


@pytest.mark.usefixtures("clean_registry")
def test_one_name_belongs_to_one_class():
    with pytest.raises(ValueError, match=r"^attention 'softmax' is registered by both attention\.softmax and .+$"):

        @attention.register("softmax")
        class Other(Attention):
            pass


@pytest.mark.usefixtures("clean_registry")
def test_a_variant_is_the_same_class_with_other_defaults():
    @attention.register("windy", windy_wide={"window": 9})
    class Windy(Attention):
        def __init__(self, num_heads, head_dim, max_length, causal=False, impl="auto", window: int = 3, turns: int = 1):
            super().__init__(num_heads, head_dim, max_length, causal, impl)
            self.window, self.turns = window, turns

    assert {"windy", "windy_wide"} <= set(attention.names())
    assert attention.options("windy") == {"window": 3, "turns": 1}
    assert attention.options("windy_wide") == {"window": 9, "turns": 1}
    assert attention.build("windy", **SIZES).window == 3
    assert attention.build("windy_wide", **SIZES).window == 9
    assert attention.build("windy_wide", **SIZES, window=5).window == 5
    assert type(attention.build("windy_wide", **SIZES)) is Windy


def test_a_new_attention_is_one_file_and_one_config_and_gets_the_contract_tests(tmp_path: Path):
    for folder in ("attention", "kernels", "conf", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "attention" / "mine.py").write_text(MINE)
    for name, gain in (("mine", 1.0), ("mine_loud", 3.0)):
        text = f"# A made-up attention.\nname: {name}\nimpl: auto\ngain: {gain}\n"
        (tmp_path / "conf" / "attention" / f"{name}.yaml").write_text(text)

    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/attention/test_contract.py", "-k", "mine"]
    run = subprocess.run([sys.executable, *tests], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
