"""What of a training step is compiled."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cells import only_record, tiny

from lra.model import Classifier


def test_what_an_attention_does_once_is_not_compiled(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch):
    """Routing's first centroids: the training step that finds them runs eagerly, all others are compiled."""
    ready = []

    def compile_(function: Callable, **_: object) -> Callable:
        def compiled(model: Classifier, *batch: torch.Tensor):
            if model.training:
                ready.append(all(m.ready for m in model.encoder.attentions()))
            return function(model, *batch)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    assert tiny(tmp_path, f"data.root={data_root}", "attention=routing", "trainer.compile=true") == 0
    assert ready == [True] * (only_record(tmp_path)["steps"] - 1)
