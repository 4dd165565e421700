"""Steps replayed as CUDA graphs do what the same steps do eagerly."""

from pathlib import Path

import pytest
import torch
from cells import only_record, stop_at, tiny

from lra import predictions
from lra.capture import Captured
from lra.data import DeviceSplit
from lra.lens import trained
from lra.record import Cell

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = (
    "trainer.accelerator=cuda",
    "model.num_layers=1",  # half as much to compile
    "training.steps=12",
    "training.warmup_steps=4",
    "training.validate_every=6",
)
"""In both intervals there are replays, in the first after three steps that are none."""

PLAIN = ("trainer.precision=32", "model.dropout=0.0")
POINT = ("train_loss", "validation_loss", "validation_correct")


def run(results: Path, data_root: Path, *arguments: str) -> int:
    return tiny(results, f"data.root={data_root}", *GPU, *arguments)


def curve(results: Path, data_root: Path, *arguments: str) -> list[dict]:
    assert run(results, data_root, *arguments) == 0
    return only_record(results)["curve"]


def points(some: list[dict]) -> list[list[float]]:
    return [[point[key] for key in POINT] for point in some]


def test_every_call_counts_and_random_numbers_stay_random():
    count, noise = torch.zeros((), device="cuda"), torch.zeros(8, device="cuda")

    def function() -> None:
        count.add_(1)
        noise.uniform_()

    def draw() -> tuple[float, ...]:
        step()
        return tuple(noise.tolist())

    def draws(seed: int) -> list[tuple[float, ...]]:
        torch.manual_seed(seed)
        return [draw() for _ in range(3)]

    step = Captured(function, torch.cuda.graph_pool_handle())
    eager = draws(0)
    first, second, again = draws(1), draws(2), draws(1)
    assert step.ready
    assert count == 12
    assert first == again
    assert len({*eager, *first, *second}) == 9


@pytest.mark.parametrize("attention", ["softmax", "lln", "adamra", "combiner", "mra", "routing"])
def test_a_captured_cell_learns_like_an_eager_one(attention: str, data_root: Path, tmp_path: Path):
    same = (f"attention={attention}", *PLAIN)
    eager = curve(tmp_path / "eager", data_root, *same, "trainer.compile=false")
    captured = curve(tmp_path / "captured", data_root, *same, "trainer.compile=true")
    for mine, other in zip(captured, eager, strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert mine["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)


def test_the_learning_rate_moves_under_capture(data_root: Path, tmp_path: Path):
    """With the rate stuck where it was captured, two schedules that agree until then would end alike."""
    slow = curve(tmp_path / "slow", data_root, *PLAIN, "trainer.compile=true", "training.warmup_steps=11")
    fast = curve(tmp_path / "fast", data_root, *PLAIN, "trainer.compile=true", "training.warmup_steps=4")
    assert slow[-1]["train_loss"] != pytest.approx(fast[-1]["train_loss"], rel=1e-5)


def test_a_captured_cell_repeats_bit_for_bit_where_that_is_asked_for(data_root: Path, tmp_path: Path):
    """Otherwise Inductor times several ways to sum, and may take another one in another run."""
    arguments = ("attention=lln", "trainer.compile=true", "trainer.deterministic=true")
    first, second = (curve(tmp_path / str(i), data_root, *arguments) for i in range(2))
    assert points(first) == points(second)


@pytest.mark.parametrize("attention", ["lln", "softmax"])
def test_a_killed_cell_continues_to_the_same_end_bit_for_bit(
    attention: str, data_root: Path, tmp_path: Path, monkeypatch
):
    """What was a replay is a first call now, and what was not is one."""
    arguments = (f"attention={attention}", "trainer.compile=true", "trainer.deterministic=true")
    whole = curve(tmp_path / "whole", data_root, *arguments)
    with monkeypatch.context() as patch:
        stop_at(9, patch)
        assert run(tmp_path / "killed", data_root, *arguments) == 130
    assert only_record(tmp_path / "killed")["status"] == "interrupted"
    assert points(curve(tmp_path / "killed", data_root, *arguments)) == points(whole)
    first, second = (only_record(tmp_path / name)["test"] for name in ("whole", "killed"))
    assert first == second


def test_a_captured_cell_keeps_its_answers_in_the_order_of_the_items(data_root: Path, tmp_path: Path):
    """1,000 items in batches of 8, most of them replays, beside its best weights on the CPU: alike but for ties."""
    same = ("attention=lln", "task.test_size=1000", "training.learning_rate=0.001", *GPU, *PLAIN)
    assert tiny(tmp_path, f"data.root={data_root}", *same, "trainer.compile=true") == 0
    record = only_record(tmp_path)
    kept = predictions.read(tmp_path, record)  # which holds them against the record's integers
    model, task = trained.load_model(Cell.of(record).directory(tmp_path), record)
    split = DeviceSplit(task.prepare(data_root, progress=False).splits["test"], torch.device("cpu"))
    with torch.no_grad():
        eager = torch.cat([model(tokens).argmax(-1) for tokens in split.tokens.split(8)])
    assert kept.labels.tolist() == split.labels.tolist()
    assert (torch.from_numpy(kept.best) == eager).float().mean() > 0.995
    assert len(eager.unique()) > 1
