"""The `mra` and `mra_s` modules: names, options, refusals."""

import pytest
import torch
from inputs import padding, qkv
from oracles.mra import block_pairs
from oracles.mra import mra_attention as oracle
from tolerance import assert_exact

import attention

SIZES = dict(num_heads=2, head_dim=8, max_length=512)


@pytest.mark.parametrize(("name", "mode"), [("mra", "full"), ("mra_s", "sparse")])
def test_a_name_is_a_mode_with_the_published_defaults(name, mode):
    assert attention.options(name) == dict(
        mode=mode, block_size=32, blocks_per_row=8, first_blocks=0, diagonal_blocks=0
    )
    q, k, v = qkv(2, 2, 400, 8)
    key_mask = padding(2, 400)
    refined = block_pairs(q, k, key_mask, block_size=32, blocks_per_row=8)
    assert not refined.all()
    expected = oracle(q, k, v, key_mask, refined, mode=mode, block_size=32)
    assert_exact(attention.build(name, **SIZES)(q, k, v, key_mask), expected)


def test_options_reach_the_kernel():
    q, k, v = qkv(2, 2, 200, 8)
    options = dict(block_size=16, blocks_per_row=4, first_blocks=1, diagonal_blocks=3)
    expected = oracle(q, k, v, None, block_pairs(q, k, None, **options), mode="sparse", block_size=16)
    assert_exact(attention.build("mra", **SIZES, mode="sparse", **options)(q, k, v), expected)


def test_a_module_has_no_state_and_no_loss():
    module = attention.build("mra", **SIZES)
    assert not module.state_dict()
    assert torch.equal(module.auxiliary_loss(), torch.zeros(()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(mode="dense"), ["attention.mode=dense", "full", "sparse"]),
        (dict(block_size=48), ["attention.block_size=48", "16, 32 or 64"]),
        (dict(block_size=32.0), ["attention.block_size=32.0", "integer"]),
        (dict(blocks_per_row=0), ["attention.blocks_per_row=0", "positive"]),
        (dict(first_blocks=-1), ["attention.first_blocks=-1", ">= 0"]),
        (dict(diagonal_blocks=1.5), ["attention.diagonal_blocks=1.5", ">= 0"]),
        (dict(diagonal_blocks=True), ["attention.diagonal_blocks=True", ">= 0"]),
        (dict(causal=True), ["attention.causal=True", "future"]),
        (dict(impl="cuda"), ["attention.impl=cuda", "reference"]),
        (dict(block=32), ["attention.block ", "block_size"]),
    ],
)
def test_a_bad_option_is_refused_in_one_line(options, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked below)
        attention.build("mra", **SIZES, **options)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
