"""Every task is complete under every protocol: what `python run.py` composes is possible, and of the published size."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lra import config, tasks
from lra.errors import UserError
from lra.model import build_classifier
from lra.schedules import build_schedule

CONF = Path(__file__).parents[2] / "conf"
SETTINGS = CONF / "protocol" / "settings"
TASKS = tasks.names()
PROTOCOLS = sorted(path.stem for path in (CONF / "protocol").glob("*.yaml"))

PARAMETERS = {"listops": 209_802, "text": 370_562, "retrieval": 395_138, "image": 174_986, "pathfinder": 173_954}
"""Of the small protocol with softmax, as the papers of its line have them."""

ORIGINAL = {"listops": 8_948_746, "text": 3_486_722, "retrieval": 1_087_618, "image": 248_458, "pathfinder": 26_530}
"""Of the original code's Transformer. Its users measured 248,458, 1.088 million and 3.49 million."""


@pytest.fixture(scope="module", autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def load(**groups):
    return config.load(compose("config", overrides=[f"{group}={choice}" for group, choice in groups.items()]))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("protocol", "budget"), [*((p, "published") for p in PROTOCOLS), ("small", "demo"), ("small", "steps")]
)
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


def count(loaded):
    built = tasks.build(loaded.task["name"], **loaded.task_options)
    sizes = OmegaConf.to_container(OmegaConf.structured(loaded.model))
    assert isinstance(sizes, dict)
    model = build_classifier(sizes, "softmax", {}, num_classes=built.num_classes, two_towers=built.two_towers)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("task", "parameters"), PARAMETERS.items())
def test_the_small_protocol_has_the_published_sizes(task, parameters):
    assert count(load(task=task, protocol="small", attention="softmax")) == parameters


@pytest.mark.parametrize("task", TASKS)
def test_the_original_protocol_has_the_sizes_of_the_original_code(task):
    loaded = load(task=task, protocol="original", attention="softmax")
    assert count(loaded) == loaded.protocol.base_parameters
    assert loaded.protocol.base_parameters == ORIGINAL.get(task, loaded.protocol.base_parameters)


def test_an_entry_with_too_many_parameters_is_refused_by_how_much_under_original_only():
    """Its own Linformer: 4 layers of a 16 × 4,000 projection beside 1,087,618 parameters."""
    with pytest.raises(UserError) as caught:
        load(task="retrieval", protocol="original", attention="linformer")
    assert str(caught.value) == (
        "attention=linformer has 1,343,618 parameters on retrieval, 23.5 % more than the base Transformer "
        "(1,087,618); protocol=original allows 10 %, protocol.parameter_margin=0.24 admits it and stars the row"
    )
    changed = {"task": "retrieval", "protocol": "original", "attention": "linformer"}
    load(**changed, **{"protocol.parameter_margin": 0.24})
    load(**changed, **{"attention.projected_length": 6})
    load(task="retrieval", protocol="small", attention="linformer")
    with pytest.raises(UserError, match=r"attention=softmax has 603,274 parameters on image, 142\.8 % more"):
        load(task="image", protocol="original", **{"model.ffn_dim": 1024})


@pytest.mark.parametrize("task", ORIGINAL)
def test_adamras_router_keeps_the_rule_of_original(task):
    load(task=task, protocol="original", attention="adamra")


def test_original_is_trained_as_its_code_trains_it():
    """Peaks of the rate: 0.05 / √1000, 0.05 / √8000, 5e-4; Retrieval's warm-up is longer than its training."""
    listops, text, retrieval, image = (
        load(task=t, protocol="original") for t in ("listops", "text", "retrieval", "image")
    )
    assert (text.protocol.selection, text.task["validation"]) == ("last", "test")
    assert (listops.protocol.selection, image.protocol.selection) == ("validation", "validation")
    assert rates(listops.training, 0, 500, 1000, 4000) == pytest.approx([0, 7.91e-4, 1.581e-3, 7.91e-4], rel=1e-3)
    assert rates(text.training, 8000) == pytest.approx([5.59e-4], rel=1e-3)
    assert rates(retrieval.training, 5000) == pytest.approx([3.494e-4], rel=1e-3)
    assert rates(image.training, 175, 17_675, 35_000) == pytest.approx([5e-4, 2.5e-4, 3.1e-8], rel=1e-2)


def rates(training, *steps):
    """At these steps, as the optimiser has them."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    schedule = build_schedule(optimizer, training)
    found = []
    for step in steps:
        optimizer.step()
        schedule.last_epoch = step - 1
        schedule.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_clean_repairs_the_known_flaws_of_small():
    small, clean = (load(task="text", protocol=name) for name in ("small", "clean"))
    assert (small.protocol.selection, small.task["validation"]) == ("test", "test")
    assert (clean.protocol.selection, clean.task["validation"]) == ("validation", "train")
    for task in ("image", "image_fashion", "pathfinder", "pathx"):
        small, clean = (load(task=task, protocol=name) for name in ("small", "clean"))
        assert (small.task["black"], small.model.pooling) == ("padding", "mean_full")
        assert (clean.task["black"], clean.model.pooling) == ("pixel", "mean_real")
        assert clean.training == small.training


@pytest.mark.parametrize("task", ["pathfinder", "pathx"])
def test_pathfinder_is_drawn_as_published_where_published_rows_stand_beside_it(task):
    drawings = {
        protocol: load(task=task, protocol=protocol).task["drawing"] for protocol in ("small", "original", "clean")
    }
    assert drawings == {"small": "published", "original": "published", "clean": "even"}


@pytest.mark.parametrize(("stand_in", "original"), [("text_reviews", "text"), ("image_fashion", "image")])
def test_a_stand_in_has_the_settings_of_its_original(stand_in, original):
    files = [{path.name: path.read_text() for path in (SETTINGS / "small" / t).iterdir()} for t in (stand_in, original)]
    assert files[0] == files[1]
    mine, reference = (load(task=task, protocol="clean") for task in (stand_in, original))
    assert (mine.model, mine.training) == (reference.model, reference.training)
