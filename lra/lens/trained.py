"""The queries, keys and values that the layers of a trained cell see."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention import Attention
from lra import tasks
from lra.data import DeviceSplit
from lra.errors import UserError
from lra.model import Classifier, build_classifier
from lra.record import FILENAME, Record, read_record

CHECKPOINT = "best.ckpt"
"""What the lens looks at: the weights of the best validation."""


class Layer(NamedTuple):
    """One attention of a model and what it was called with: q, k, v (B, H, N, D), key_mask (B, N)."""

    module: Attention
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None


def read_cell(directory: Path) -> Record:
    """The record of the trained cell in `directory`; UserError where there is none."""
    record = read_record(directory / FILENAME)
    if record is None or "config" not in record:
        raise UserError(f"cell={directory} is no trained cell; name a folder results/runs/…/seed0 with a {FILENAME}")
    return record


def load_model(directory: Path, record: Record) -> tuple[Classifier, tasks.Task]:
    """Model (best validation, eval mode, on the CPU) and task of the cell in `directory`.

    UserError where its checkpoint is missing or does not fit.
    """
    config = record["config"]
    task = tasks.build(**config["task"])
    model = build_classifier(
        config["model"],
        config["attention"]["name"],
        {key: value for key, value in config["attention"].items() if key != "name"},
        num_classes=task.num_classes,
        two_towers=task.two_towers,
    )
    try:
        model.load_state_dict(_weights(directory / CHECKPOINT))
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cell={directory}: {CHECKPOINT} cannot be used: {reason}") from error
    return model.eval(), task


def _weights(path: Path) -> Mapping[str, Any]:
    """The classifier's part of a `CellModule` checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}


def validation_tokens(task: tasks.Task, data_root: Path, count: int) -> Tensor:
    """The first `count` items of the validation split, as a batch of the model."""
    data = task.prepare(data_root)
    split = DeviceSplit(data.splits["validation"], torch.device("cpu"))
    return split.gather(torch.arange(min(count, len(split))))[0]


@torch.no_grad()
def layers(model: Classifier, tokens: Tensor) -> list[Layer]:
    """What every attention of `model` is called with when it reads `tokens`, first layer first."""
    seen: list[Layer] = []

    def remember(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        seen.append(Layer(module, *arguments))

    hooks = [core.register_forward_pre_hook(remember) for core in model.encoder.attentions()]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
