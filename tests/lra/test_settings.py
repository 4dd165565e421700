"""What a protocol sets for an attention on a task, `conf/protocol/settings`: only what exists."""

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import attention
from lra.config import ModelConfig

SETTINGS = Path(__file__).parents[2] / "conf" / "protocol" / "settings"
FILES = sorted(SETTINGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SETTINGS)))
def test_settings_name_options_of_their_attention_and_sizes_of_the_model(path: Path):
    settings = OmegaConf.load(path)
    assert path.read_text().startswith("# @package _global_\n# ")
    assert set(settings) <= {"attention", "model"}
    assert set(settings.get("attention", {})) <= set(attention.options(path.stem))
    assert set(settings.get("model", {})) <= {field.name for field in fields(ModelConfig)}


def test_mra_reads_grids_by_patches():
    for task in ("image", "pathfinder"):
        for name in ("mra", "mra_s"):
            assert OmegaConf.load(SETTINGS / "small" / task / f"{name}.yaml").model.patch == [4, 8]
