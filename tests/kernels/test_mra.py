"""MRA's selection of blocks, then its values and gradients on the same blocks, against the definition."""

import pytest
import torch
from inputs import padding, qkv
from oracles.mra import block_pairs
from oracles.mra import mra_attention as oracle
from oracles.softmax import softmax_attention
from tolerance import assert_exact, relative_error

from kernels.mra import mra_attention
from kernels.mra.reference import attend_blocks, select_blocks

LENGTHS = [1, 2, 31, 33, 64, 100]
PADDINGS = [None, "suffix", "scattered", "one", "empty"]
MODES = ["full", "sparse"]
PRIORS = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 3)]  # first_blocks, diagonal_blocks


def mask_of(kind: str | None, batch: int, length: int) -> torch.Tensor | None:
    return None if kind is None else padding(batch, length, kind=kind)


def as_pairs(selection: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Flat indices (B, H, m) as a (B, H, nb, nb) bool map."""
    flat = torch.zeros(*selection.shape[:2], num_blocks**2, dtype=torch.bool)
    return flat.scatter(-1, selection, True).unflatten(-1, (num_blocks, num_blocks))


def blocks_of(x: torch.Tensor, block_size: int) -> int:
    return -(-x.shape[2] // block_size)


@pytest.mark.parametrize("priors", PRIORS)
@pytest.mark.parametrize("kind", PADDINGS)
def test_selection_is_the_top_of_the_sorted_pairs(kind, priors):
    for length, block_size, blocks_per_row in [(1, 16, 1), (33, 16, 2), (100, 16, 1), (100, 16, 3), (300, 64, 2)]:
        q, k, _ = qkv(3, 2, length, 8)
        options = dict(blocks_per_row=blocks_per_row, first_blocks=priors[0], diagonal_blocks=priors[1])
        key_mask = mask_of(kind, 3, length)
        actual = select_blocks(q, k, key_mask, block_size=block_size, **options)
        expected = block_pairs(q, k, key_mask, block_size=block_size, **options)
        assert torch.equal(as_pairs(actual, blocks_of(q, block_size)), expected), (length, block_size, blocks_per_row)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_agree_with_the_definition(length, kind, mode):
    key_mask = mask_of(kind, 3, length)
    weight = qkv(3, 2, length, 8, seed=1)[0]
    options = dict(block_size=16, blocks_per_row=2, first_blocks=1, diagonal_blocks=0)
    inputs = qkv(3, 2, length, 8, requires_grad=True)
    refined = block_pairs(*inputs[:2], key_mask, **options)
    out = mra_attention(*inputs, key_mask, mode=mode, **options)
    expected = oracle(*inputs, key_mask, refined, mode=mode, block_size=16)
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected)]
    assert_exact(out, expected, "out")
    for name, actual, wanted in zip(["dq", "dk", "dv"], *gradients, strict=True):
        assert_exact(actual, wanted, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-3, 10.0, 100.0])
def test_values_and_gradients_hold_at_every_scale(scale, mode):
    inputs = qkv(2, 2, 100, 8, scale=scale, requires_grad=True)
    key_mask = padding(2, 100, kind="scattered")
    options = dict(block_size=16, blocks_per_row=1)
    refined = block_pairs(*inputs[:2], key_mask, **options)
    out = mra_attention(*inputs, key_mask, mode=mode, **options)
    expected = oracle(*inputs, key_mask, refined, mode=mode, block_size=16)
    assert_exact(out, expected, "out")
    for x, y in zip(*(torch.autograd.grad(o.sum(), inputs) for o in (out, expected)), strict=True):
        assert_exact(x, y, "gradient")


@pytest.mark.parametrize(("length", "pairs"), [(1024, 256), (2048, 512), (4096, 1024), (2000, 504), (100, 16)])
def test_budget_is_that_of_the_call_and_of_a_whole_head(length, pairs):
    q, k, _ = qkv(1, 2, length, 4)
    selection = select_blocks(q, k, None, block_size=32, blocks_per_row=8, first_blocks=0, diagonal_blocks=0)
    assert selection.shape == (1, 2, pairs)
    assert (selection.diff(dim=-1) > 0).all(), "ascending, each pair once"
    if length >= 1024:
        per_row = as_pairs(selection, blocks_of(q, 32)).sum(-1)
        assert per_row.min() >= 1, "the best block of a row scores as high as any"
        assert per_row.min() < per_row.max(), "rows compete for the budget"


def test_ties_go_to_the_lowest_index_after_priors():
    q, k, _ = qkv(1, 1, 64, 4, scale=0.0)
    options = dict(block_size=16, blocks_per_row=2)
    plain = select_blocks(q, k, None, first_blocks=0, diagonal_blocks=0, **options)
    assert plain.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    diagonal = select_blocks(q, k, None, first_blocks=0, diagonal_blocks=1, **options)
    assert diagonal.flatten().tolist() == [0, 1, 2, 3, 4, 5, 10, 15]
    first = select_blocks(q, k, None, first_blocks=1, diagonal_blocks=0, **options)
    assert first.flatten().tolist() == [0, 1, 2, 3, 4, 5, 8, 12]


@pytest.mark.parametrize(("diagonal_blocks", "reach"), [(1, 0), (2, 1), (3, 1), (5, 2)])
def test_diagonal_prior_counts_as_published(diagonal_blocks, reach):
    q, k, _ = qkv(1, 1, 160, 4)
    block = torch.arange(10)
    band = (block[:, None] - block).abs() <= reach
    selection = select_blocks(
        q, k, None, block_size=16, blocks_per_row=5, first_blocks=0, diagonal_blocks=diagonal_blocks
    )
    assert as_pairs(selection, 10)[0, 0][band].all()
    assert selection.shape[-1] == 50


@pytest.mark.parametrize("priors", PRIORS)
def test_selection_equals_the_published_sums(priors):
    """The authors rank by S − max S, plus 5e3 a prior; with all blocks full that is the same order."""
    q, k, _ = qkv(2, 2, 160, 8)
    mean_q, mean_k = (x.unflatten(2, (10, 16)).mean(3) for x in (q, k))
    score = mean_q @ mean_k.transpose(-1, -2) / 8**0.5
    score = score - score.amax(-1, keepdim=True)
    score[:, :, : priors[0]] += 5e3
    score[:, :, :, : priors[0]] += 5e3
    for x in range(10):
        for y in range(10):
            score[:, :, x, y] += 5e3 * (priors[1] > 0 and abs(x - y) <= priors[1] // 2)
    published = score.flatten(2).topk(40).indices.sort(-1).values
    selection = select_blocks(
        q, k, None, block_size=16, blocks_per_row=4, first_blocks=priors[0], diagonal_blocks=priors[1]
    )
    # Ten row maxima tie at 0 and lead their rank; the budget of 40 cuts behind them, never through.
    assert torch.equal(selection, published)


def test_blocks_of_padding_come_last_whatever_the_priors():
    q, k, _ = qkv(1, 1, 64, 4)
    key_mask = torch.arange(64)[None] >= 32  # two empty blocks, then two full ones
    selection = select_blocks(q, k, key_mask, block_size=16, blocks_per_row=1, first_blocks=2, diagonal_blocks=1)
    assert selection.flatten().tolist() == [10, 11, 14, 15]


@pytest.mark.parametrize("kind", [None, "scattered"])
@pytest.mark.parametrize("mode", MODES)
def test_error_falls_with_the_budget_and_vanishes_at_full_density(mode, kind):
    q, k, v = qkv(2, 2, 250, 16)
    key_mask = mask_of(kind, 2, 250)
    exact = softmax_attention(q, k, v, key_mask)
    outs = [
        mra_attention(q, k, v, key_mask, mode=mode, block_size=16, blocks_per_row=n) for n in (1, 2, 4, 8, 12, 16, 99)
    ]
    errors = [relative_error(out, exact) for out in outs]
    assert errors[:5] == sorted(errors[:5], reverse=True)
    assert errors[4] > 0.01
    assert_exact(outs[5], exact)
    assert_exact(outs[6], exact)


@pytest.mark.parametrize("kind", [None, "suffix", "scattered"])
def test_full_mode_is_softmax_where_queries_and_keys_are_constant_on_blocks(kind):
    """The block means lose nothing then, whatever is refined: the coarse term must count real tokens."""
    q, k, v = qkv(2, 2, 100, 8)
    block = torch.arange(100) // 16
    q, k = q[:, :, block], k[:, :, block]
    key_mask = mask_of(kind, 2, 100)
    out = mra_attention(q, k, v, key_mask, block_size=16, blocks_per_row=1)
    assert_exact(out, softmax_attention(q, k, v, key_mask))


def test_rows_without_a_refined_block_are_coarse_or_zero():
    _, _, v = qkv(1, 1, 64, 4)
    zeros = torch.zeros_like(v)  # ties: the four pairs of row 0 are refined, no others
    mean = v.mean(2, keepdim=True).expand_as(v)
    assert_exact(mra_attention(zeros, zeros, v, block_size=16, blocks_per_row=1), mean)
    sparse = mra_attention(zeros, zeros, v, mode="sparse", block_size=16, blocks_per_row=1)
    assert_exact(sparse[:, :, :16], mean[:, :, :16])
    assert (sparse[:, :, 16:] == 0).all()


def test_only_full_mode_has_a_gradient_beyond_the_refined_blocks():
    inputs = qkv(1, 1, 64, 4, requires_grad=True)
    selection = torch.tensor([[[0, 4, 8, 12]]])  # key block 0 for every row
    for mode, reached in (("full", True), ("sparse", False)):
        out = attend_blocks(*inputs, None, selection, mode=mode, block_size=16)
        _, dk, dv = torch.autograd.grad((out**2).sum(), inputs)
        assert (dk[:, :, 16:] != 0).all() == (dv[:, :, 16:] != 0).all() == reached
        assert (dk[:, :, 16:] == 0).all() == (dv[:, :, 16:] == 0).all() == (not reached)


def test_padding_takes_no_part_whatever_it_holds():
    key_mask = padding(3, 50, kind="scattered")
    results = []
    for junk in (0.0, 1e30):
        inputs = [x.masked_fill(~key_mask[:, None, :, None], junk).requires_grad_() for x in qkv(3, 2, 50, 8)]
        out = mra_attention(*inputs, key_mask, block_size=16, blocks_per_row=2)
        results.append([out, *torch.autograd.grad((out**2).sum(), inputs)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
        assert (dirty.masked_select(~key_mask[:, None, :, None]) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    inputs = qkv(2, 2, 100, 8, dtype=dtype)
    out = mra_attention(*inputs, block_size=16, blocks_per_row=2)
    single = mra_attention(*(x.float() for x in inputs), block_size=16, blocks_per_row=2)
    assert torch.equal(out, single.to(dtype))


@pytest.mark.parametrize("mode", MODES)
def test_padding_does_not_lift_the_maximum_of_very_negative_logits(mode):
    """Zeroed padding has logit 0: a maximum that included it would underflow every real weight."""
    q, k, v = qkv(2, 1, 96, 4)
    q, k = q + 100, k - 100  # logits near −20000
    key_mask = (torch.arange(96) < 70) & (torch.arange(96) % 3 > 0)  # holes in every block, the last one empty
    key_mask = key_mask.expand(2, -1)
    options = dict(block_size=16, blocks_per_row=2)
    refined = block_pairs(q, k, key_mask, **options)
    out = mra_attention(q, k, v, key_mask, mode=mode, **options)
    assert_exact(out, oracle(q, k, v, key_mask, refined, mode=mode, block_size=16))
    assert mode == "sparse" or (out.abs().amax(-1)[key_mask[:, None]] > 0).all()
