"""The order of training: seeded, complete, and a function of the step alone."""

import numpy as np
import torch

from lra.data import DeviceSplit, TrainingOrder
from lra.seeding import derive_seed
from lra.tasks import Split

CPU = torch.device("cpu")


def order(seed: int = 0, size: int = 10, batch_size: int = 4) -> TrainingOrder:
    return TrainingOrder(size, batch_size, seed, CPU)


def test_every_item_comes_once_a_pass_though_batches_straddle_passes():
    stream = torch.cat([order().indices(step) for step in range(10)])  # 40 indices, 4 passes
    for start in range(0, 40, 10):
        assert sorted(stream[start : start + 10].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:20].tolist()


def test_a_step_has_the_same_batch_whoever_asks_and_when():
    steady, resumed = order(), order()
    for step in range(9):
        steady.indices(step)
    assert steady.indices(9).tolist() == resumed.indices(9).tolist()
    assert resumed.indices(2).tolist() == order().indices(2).tolist()


def test_a_batch_may_be_larger_than_the_data():
    assert len(order(size=3, batch_size=8).indices(0)) == 8


def test_another_seed_is_another_order():
    assert order(seed=0).indices(0).tolist() != order(seed=1).indices(0).tolist()


def test_seeds_depend_on_every_part_and_never_change():
    assert derive_seed(0, "order", 1) == 2961819992523135983
    assert (
        len({derive_seed(*parts) for parts in [(0, "order", 1), (1, "order", 0), (0, "dropout", 1), (0, "order")]}) == 4
    )


def test_evaluation_sees_every_item_once_in_order_and_the_last_batch_is_short():
    tokens = np.arange(20, dtype=np.uint8).reshape(10, 2)
    split = DeviceSplit(Split(tokens, np.arange(10, dtype=np.uint8)), CPU)
    batches = list(split.batches(4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    assert batches[1][0].tolist() == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert batches[0][0].dtype == torch.int64
