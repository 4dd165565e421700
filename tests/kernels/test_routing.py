"""Routing attention's reference against its definition, and what the definition implies."""

import inputs
import pytest
import torch
from oracles import routing as oracle
from tolerance import assert_exact
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from kernels.routing import routing_attention
from kernels.routing.centroids import lloyd_centroids, sample_centroids
from kernels.routing.reference import (
    cluster_attention,
    cluster_scores,
    commitment,
    local_attention,
    membership,
)

LENGTHS = (1, 2, 31, 33, 64, 100)
PADDINGS = (None, "suffix", "scattered", "one", "empty")
BATCH, HEADS, DIM = 2, 2, 4


def centroids(heads: int, clusters: int, dim: int = DIM, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, clusters, dim, generator=generator, dtype=torch.float64)


def mask_of(kind: str | None, length: int) -> torch.Tensor | None:
    return None if kind is None else inputs.padding(BATCH, length, kind=kind, seed=length)


def gradients(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), leaves))


def real_positions(mask: torch.Tensor | None, b: int, length: int) -> list[int]:
    return [i for i in range(length) if mask is None or mask[b, i]]


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("length", LENGTHS)
def test_members_are_the_best_real_tokens_of_each_cluster(length, kind):
    q, _, _ = inputs.qkv(BATCH, HEADS, length, DIM, seed=length)
    mask, mu, window = mask_of(kind, length), centroids(HEADS, 3), 12
    x_hat = oracle.normalised(q)
    index = membership(cluster_scores(x_hat, mu), window, mask)
    assert index.shape == (BATCH, HEADS, 3, min(window, length))
    for b in range(BATCH):
        for h in range(HEADS):
            for c in range(3):
                chosen = oracle.members(x_hat[b, h], mu[h, c], window, real_positions(mask, b, length))
                empty = [length] * (min(window, length) - len(chosen))
                assert index[b, h, c].tolist() == chosen + empty


def test_equal_scores_go_to_the_lower_position():
    scores = torch.tensor([1.0, 5.0, 1.0, 1.0, 5.0, 0.0]).expand(1, 1, 1, 6)
    assert membership(scores, 3).tolist() == [[[[0, 1, 4]]]]
    mask = torch.tensor([[False, True, True, True, True, True]])
    assert membership(scores, 3, mask).tolist() == [[[[1, 2, 4]]]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("length", LENGTHS)
def test_output_and_gradients_agree_with_the_definition(length, kind, causal):
    leaves = inputs.qkv(BATCH, HEADS, length, DIM, seed=length, requires_grad=True)
    mask, mu = mask_of(kind, length), centroids(1, 4)
    settings = dict(window=9, key_mask=mask, causal=causal)
    result = routing_attention(*leaves, mu, local_window=7, **settings)
    expected = oracle.routing(*leaves, mu, block=7, **settings)
    assert_exact(result.out.detach(), expected.detach(), "out")
    for name, ours, theirs in zip("qkv", gradients(result.out, leaves), gradients(expected, leaves), strict=True):
        assert_exact(ours, theirs, f"gradient of {name}")


@pytest.mark.parametrize("causal", [False, True])
def test_values_agree_on_any_given_selection(causal):
    """Tokens in none, one and several clusters, empty slots, and queries that differ from the keys."""
    length = 10
    leaves = inputs.qkv(1, 1, length, DIM, seed=3, requires_grad=True)
    q_members = [[0, 3, 4], [3, 9], [3, 5, 6]]
    k_members = [[0, 1, 8], [2, 3, 4], [7, 9]]
    q_index, k_index = (
        torch.tensor([row + [length] * (3 - len(row)) for row in rows])[None, None] for rows in (q_members, k_members)
    )
    q, k, v = leaves
    out = cluster_attention(oracle.normalised(q), oracle.normalised(k), v, q_index, k_index, causal)
    expected = oracle.routing_head(q[0, 0], k[0, 0], v[0, 0], q_members, k_members, causal)
    assert_exact(out[0, 0].detach(), expected.detach(), "out")
    assert not out[0, 0, 1].any()  # in no cluster
    for name, ours, theirs in zip("qkv", gradients(out[0, 0], leaves), gradients(expected, leaves), strict=True):
        assert_exact(ours, theirs, f"gradient of {name}")


@pytest.mark.parametrize("kind", PADDINGS)
def test_training_statistics_agree_with_the_definition(kind):
    length = 20
    q, k, v = inputs.qkv(BATCH, HEADS, length, DIM, requires_grad=True)
    mask, mu = mask_of(kind, length), centroids(HEADS, 5)
    result = routing_attention(q, k, v, mu, window=4, local_window=4, key_mask=mask)
    counts, sums = torch.zeros(HEADS, 5, dtype=torch.float64), torch.zeros(HEADS, 5, DIM, dtype=torch.float64)
    for x in (q, k):
        for h, c, vector in oracle.assignments(x.detach(), mu, mask):
            counts[h, c] += 1
            sums[h, c] += vector
    assert torch.equal(result.counts, counts)
    assert_exact(result.sums, sums, "sums")
    expected = oracle.commitment(q, k, mu, mask)
    assert_exact(result.commitment.detach(), expected.detach(), "commitment")
    ours, theirs = (torch.autograd.grad(loss, (q, k)) for loss in (result.commitment, expected))
    for name, a, b in zip("qk", ours, theirs, strict=True):
        assert_exact(a, b, f"gradient of the commitment in {name}")


def test_one_cluster_of_the_whole_length_is_softmax_on_normalised_vectors():
    q, k, v = inputs.qkv(2, 2, 50, 8)
    out = routing_attention(q, k, v, centroids(2, 1, 8), window=50, local_window=1).out
    hats = (layer_norm(x, x.shape[-1:], eps=1e-6) for x in (q, k))
    assert_exact(out, scaled_dot_product_attention(*hats, v))


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_beyond_the_length_makes_every_cluster_the_whole_sequence(causal):
    q, k, v = inputs.qkv(2, 2, 20, 8)
    out = routing_attention(q, k, v, centroids(2, 5, 8), window=1000, local_window=1, causal=causal).out
    hats = (layer_norm(x, x.shape[-1:], eps=1e-6) for x in (q, k))
    assert_exact(out, scaled_dot_product_attention(*hats, v, is_causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_a_local_block_of_the_whole_length_is_softmax(causal):
    q, k, v = inputs.qkv(2, 2, 33, 8)
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal)
    for block in (33, 100):
        assert_exact(local_attention(q, k, v, block, causal=causal), expected)


def test_only_the_direction_of_queries_and_keys_matters_to_a_routing_head():
    q, k, v = inputs.qkv(1, 1, 40, 8)
    mu = centroids(1, 3, 8)
    plain = routing_attention(q, k, v, mu, window=9, local_window=1).out
    scaled = routing_attention(50 * q + 3, 2 * k - 1, v, mu, window=9, local_window=1).out
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)  # up to the ε of LayerNorm


@pytest.mark.parametrize("window", [6, 30])
def test_causal_future_reaches_the_past_through_membership_only(window):
    """With the same members (always so for window >= N), nothing behind a position changes it."""
    length, cut = 30, 17
    x, y = inputs.qkv(1, 1, length, 8), inputs.qkv(1, 1, length, 8, seed=1)
    changed = [torch.cat([a[:, :, :cut], b[:, :, cut:]], 2) for a, b in zip(x, y, strict=True)]
    mu = centroids(1, 3, 8)
    q_index, k_index = (membership(cluster_scores(oracle.normalised(a), mu), window) for a in x[:2])
    past = [cluster_attention(*inputs_, q_index, k_index, True)[:, :, :cut] for inputs_ in (x, changed)]
    assert torch.equal(*past)
    full = [routing_attention(*a, mu, window=window, local_window=1, causal=True).out[:, :, :cut] for a in (x, changed)]
    assert torch.allclose(*full, rtol=1e-12, atol=1e-12) == (window >= length)
    local = [local_attention(*a, 5, causal=True)[:, :, :cut] for a in (x, changed)]
    assert torch.equal(*local)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", PADDINGS[1:])
def test_padding_neither_gives_nor_gets(kind, causal):
    length, mu = 40, centroids(1, 4, 8)
    mask = mask_of(kind, length)
    assert mask is not None
    padded = ~mask[:, None, :, None]

    def run(junk: float):
        leaves = [x.masked_fill(padded, junk).requires_grad_() for x in inputs.qkv(BATCH, 2, length, 8)]
        result = routing_attention(*leaves, mu, window=11, local_window=8, key_mask=mask, causal=causal)
        grads = torch.autograd.grad(result.out.square().sum() + result.commitment, leaves)
        return [*result, *grads]

    plain, huge = run(0.0), run(1e300)
    assert all(torch.equal(a, b) for a, b in zip(plain, huge, strict=True))
    assert all(torch.isfinite(x).all() for x in plain)
    assert all(not x.masked_select(padded).any() for x in (plain[0], *plain[-3:]))


def test_commitment_pulls_a_vector_to_its_best_centroid_only():
    mu = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).expand(1, 1, 2, 2)
    best = torch.tensor([[[0, 1]]])
    assert commitment(x, mu, best, None).item() == (1 + 4) / 4
    assert commitment(x, mu, best, torch.tensor([[True, False]])).item() == 1 / 2


@pytest.mark.parametrize("kind", PADDINGS)
def test_a_sample_is_of_different_real_tokens_filled_up_with_what_was_there(kind):
    length, clusters = 6, 10
    x, _, _ = inputs.qkv(BATCH, HEADS, length, DIM)
    mask, before = mask_of(kind, length), centroids(HEADS, clusters)
    drawn = sample_centroids(x, before, mask)
    for h in range(HEADS):
        tokens = [tuple(x[b, h, i].tolist()) for b in range(BATCH) for i in real_positions(mask, b, length)]
        rows, count = [tuple(row) for row in drawn[h].tolist()], min(clusters, len(tokens))
        assert len(set(rows)) == clusters
        assert set(rows[:count]) <= set(tokens)
        assert rows[count:] == [tuple(row) for row in before[h, count:].tolist()]


def test_a_lloyd_step_goes_to_the_normalised_sum_and_leaves_an_empty_cluster_in_its_place():
    before, counts = centroids(1, 2), torch.tensor([[3.0, 0.0]])
    sums = torch.tensor([[[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    after = lloyd_centroids(counts, sums, before)
    assert_exact(after[:, 0], oracle.normalised(sums[:, 0]))
    assert torch.equal(after[:, 1], before[:, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window=0), "attention.window=0 must be a positive integer"),
        (dict(local_window=-1), "attention.local_window=-1 must be a positive integer"),
        (dict(impl="cuda"), "attention.impl=cuda is not available for routing"),
        (dict(centroids=centroids(3, 2)), r"at most 2 heads of 4, got \(3, 2, 4\)"),
        (dict(centroids=centroids(1, 2, 8)), r"at most 2 heads of 4, got \(1, 2, 8\)"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(change, message):
    q, k, v = inputs.qkv(1, HEADS, 5, DIM)
    with pytest.raises(ValueError, match=message) as error:
        routing_attention(q, k, v, **{"centroids": centroids(1, 2), "window": 2, "local_window": 2, **change})
    assert "\n" not in str(error.value)
