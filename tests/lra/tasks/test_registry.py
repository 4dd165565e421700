"""Every task is named once, and its YAML says exactly what its class takes."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lra import tasks
from lra.errors import UserError

CONF = Path(__file__).parents[3] / "conf" / "task"


@pytest.mark.parametrize("name", tasks.names())
def test_the_config_of_a_task_holds_its_options_and_their_defaults(name):
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(config, dict)
    assert config.pop("name") == name
    assert config == tasks.options(name)
    assert (CONF / f"{name}.yaml").read_text().startswith("# ")


def test_every_config_has_a_task():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(tasks.names())


def test_a_built_task_keeps_the_contract():
    task = tasks.build("listops")
    assert (task.name, task.num_classes, task.vocab_size, task.max_length) == ("listops", 10, 16, 2000)
    assert (task.two_towers, task.grid) == (False, None)


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"task=listop is unknown; known: .*listops"):
        tasks.build("listop")


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"task\.sead is not an option of listops; options: source, seed, "):
        tasks.build("listops", sead=1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("source", "hub"),
        ("brackets", True),
        ("seed", -1),
        ("seed", "abc"),
        ("max_length", 0),
        ("train_size", 0),
        ("test_size", 1.5),
        ("validation_size", True),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(option, value):
    with pytest.raises(UserError, match=rf"^task\.{option}=.*{value}"):
        tasks.build("listops", **{option: value})


def test_naming_the_tasks_does_not_load_the_compiler():
    import subprocess

    code = "import sys; from lra import tasks; tasks.build('listops'); print({'numba', 'torch'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=CONF.parents[1], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
