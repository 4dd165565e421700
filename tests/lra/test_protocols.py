"""Every task is complete under every protocol: what `python run.py` composes is possible, and of the published size."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lra import config, tasks
from lra.model import build_classifier

CONF = Path(__file__).parents[2] / "conf"
SETTINGS = CONF / "protocol" / "settings"
TASKS = tasks.names()
PROTOCOLS = sorted(path.stem for path in (CONF / "protocol").glob("*.yaml"))

PARAMETERS = {"listops": 209_802, "text": 370_562, "retrieval": 395_138, "image": 174_986, "pathfinder": 173_954}
"""Of the small protocol with softmax, as the papers of its line have them."""


@pytest.fixture(scope="module", autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def load(**groups):
    return config.load(compose("config", overrides=[f"{group}={choice}" for group, choice in groups.items()]))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("protocol", "budget"), [*((name, "published") for name in PROTOCOLS), ("small", "demo")])
def test_every_task_has_a_complete_protocol_and_budget(task, protocol, budget):
    loaded = load(task=task, protocol=protocol, budget=budget, attention="none")
    built = tasks.build(task, **loaded.task_options)
    assert loaded.model.max_length >= built.max_length
    assert loaded.training.steps >= loaded.training.validate_every


@pytest.mark.parametrize(
    "path", sorted(SETTINGS.glob("small/*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_settings_of_a_paper_are_possible_on_its_task(path):
    load(task=path.parent.name, protocol="small", attention=path.stem)


def test_clean_takes_the_settings_of_small():
    small, clean = (
        {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.yaml")}
        for folder in (SETTINGS / "small", SETTINGS / "clean")
    )
    assert small == clean


@pytest.mark.parametrize(("task", "parameters"), PARAMETERS.items())
def test_the_small_protocol_has_the_published_sizes(task, parameters):
    loaded = load(task=task, protocol="small", attention="softmax")
    built = tasks.build(task, **loaded.task_options)
    sizes = OmegaConf.to_container(OmegaConf.structured(loaded.model))
    assert isinstance(sizes, dict)
    model = build_classifier(sizes, "softmax", {}, num_classes=built.num_classes, two_towers=built.two_towers)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_clean_repairs_the_known_flaws_of_small():
    small, clean = (load(task="text", protocol=name) for name in ("small", "clean"))
    assert (small.protocol.selection, small.task["validation"]) == ("test", "test")
    assert (clean.protocol.selection, clean.task["validation"]) == ("validation", "train")
    for task in ("image", "image_fashion", "pathfinder", "pathx"):
        small, clean = (load(task=task, protocol=name) for name in ("small", "clean"))
        assert (small.task["black"], small.model.pooling) == ("padding", "mean_full")
        assert (clean.task["black"], clean.model.pooling) == ("pixel", "mean_real")
        assert clean.training == small.training


@pytest.mark.parametrize(("stand_in", "original"), [("text_reviews", "text"), ("image_fashion", "image")])
def test_a_stand_in_has_the_settings_of_its_original(stand_in, original):
    files = [{path.name: path.read_text() for path in (SETTINGS / "small" / t).iterdir()} for t in (stand_in, original)]
    assert files[0] == files[1]
    mine, reference = (load(task=task, protocol="clean") for task in (stand_in, original))
    assert (mine.model, mine.training) == (reference.model, reference.training)
