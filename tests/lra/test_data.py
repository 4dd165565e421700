"""The order of training: seeded, complete, and a function of the step alone."""

import numpy as np
import torch

from lra.data import DeviceSplit, TrainingOrder
from lra.seeding import derive_seed
from lra.tasks import Split

CPU = torch.device("cpu")


def order(seed: int = 0, size: int = 10, batch_size: int = 4) -> TrainingOrder:
    return TrainingOrder(size, batch_size, seed, CPU)


def indices(training_order: TrainingOrder, step: int) -> torch.Tensor:
    out = torch.full((training_order.batch_size,), -1)
    training_order.write(step, out)
    return out


def test_every_item_comes_once_a_pass_though_batches_straddle_passes():
    stream = torch.cat([indices(order(), step) for step in range(10)])  # 40 indices, 4 passes
    for start in range(0, 40, 10):
        assert sorted(stream[start : start + 10].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:20].tolist()


def test_a_step_has_the_same_batch_whoever_asks_and_when():
    steady, resumed = order(), order()
    for step in range(9):
        indices(steady, step)
    assert indices(steady, 9).tolist() == indices(resumed, 9).tolist()
    assert indices(resumed, 2).tolist() == indices(order(), 2).tolist()


def test_a_batch_may_be_larger_than_the_data():
    assert set(indices(order(size=3, batch_size=8), 0).tolist()) == {0, 1, 2}


def test_another_seed_is_another_order():
    assert indices(order(seed=0), 0).tolist() != indices(order(seed=1), 0).tolist()


def test_seeds_depend_on_every_part_and_never_change():
    assert derive_seed(0, "order", 1) == 2961819992523135983
    assert (
        len({derive_seed(*parts) for parts in [(0, "order", 1), (1, "order", 0), (0, "dropout", 1), (0, "order")]}) == 4
    )


def test_a_batch_is_gathered_as_it_is_stored():
    split = DeviceSplit(Split(np.arange(20, dtype=np.uint8).reshape(10, 2), np.arange(10, dtype=np.uint8)), CPU)
    tokens, labels = split.gather(torch.tensor([4, 0]))
    assert tokens.tolist() == [[8, 9], [0, 1]]
    assert tokens.dtype == torch.uint8
    assert labels.tolist() == [4, 0]
    assert labels.dtype == torch.int64
