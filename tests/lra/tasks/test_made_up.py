"""Made-up data has the shape of the task that it stands in for, and is never taken without being asked for."""

from pathlib import Path

import numpy as np
import pytest

from lra import tasks
from lra.errors import UserError

SIZES = dict(train_size=40, validation_size=4, test_size=4)


@pytest.mark.parametrize(("name", "shape"), [("text", (50,)), ("retrieval", (2, 50))])
def test_texts_are_cut_and_padded_at_the_end(name: str, shape: tuple, tmp_path: Path):
    task = tasks.build(name, source="made_up", max_length=50, **SIZES)
    data = task.prepare(tmp_path, progress=False)
    tokens, labels = data.splits["train"]
    assert tokens.shape == (40, *shape)
    assert set(np.unique(labels)) == {0, 1}
    real = tokens != 0
    assert real[..., 0].all()
    assert (np.diff(real.astype(int), axis=-1) <= 0).all()  # padding is a suffix
    assert tokens.max() < task.vocab_size
    assert data.source == "made_up"


def test_reviews_are_short_papers_are_long(tmp_path: Path):
    shares = {}
    for name in ("text", "retrieval"):
        data = tasks.build(name, source="made_up", **SIZES).prepare(tmp_path, progress=False)
        shares[name] = (data.splits["train"].tokens != 0).mean()
    assert 0.2 < shares["text"] < 0.4
    assert shares["retrieval"] > 0.95


@pytest.mark.parametrize("black", ["padding", "pixel"])
def test_an_image_has_no_padding(black: str, tmp_path: Path):
    task = tasks.build("image", source="made_up", black=black, **SIZES)
    tokens, labels = task.prepare(tmp_path, progress=False).splits["train"]
    assert tokens.shape == (40, 1024)
    assert tokens.min() > 0
    assert tokens.max() == task.vocab_size - 1
    assert labels.max() < 10


def test_the_same_is_made_everywhere(tmp_path: Path):
    task = tasks.build("text", source="made_up", max_length=50, **SIZES)
    assert len({task.prepare(tmp_path / str(i), progress=False).digest for i in range(2)}) == 1


def test_it_is_never_taken_unasked(tmp_path: Path):
    with pytest.raises(UserError):
        tasks.build("image", source="local", **SIZES).prepare(tmp_path, progress=False)
    assert tasks.build("image", **SIZES).recipe(tmp_path).source == "hub"
