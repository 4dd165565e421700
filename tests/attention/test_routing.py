"""The state of routing attention: how centroids begin, move, are saved and are shared between processes."""

import subprocess
import sys
from pathlib import Path

import inputs
import pytest
import torch
from oracles import routing as oracle
from tolerance import assert_exact
from torch import distributed

import attention

ROOT = Path(__file__).parents[2]


def module(dtype: torch.dtype = torch.float64, **options) -> attention.Attention:
    torch.manual_seed(0)
    options = dict(num_clusters=4, window=8, local_window=8) | options
    return attention.build("routing", num_heads=2, head_dim=8, max_length=64, **options).to(dtype)


def state(routing: attention.Attention) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in routing.buffers()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def groups(count: int = 4, length: int = 64, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v of one sequence, one head, whose tokens lie in `count` well separated groups of equal size."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.eye(8, dtype=torch.float64)[:count].repeat(length // count, 1)
    return [
        (means + 0.1 * torch.randn(length, 8, generator=generator, dtype=torch.float64))[None, None] for _ in range(3)
    ]


@pytest.mark.parametrize("init", ["lloyd", "paper"])
def test_a_fresh_module_evaluates_without_having_seen_a_batch(init):
    routing = module(init=init).eval()
    before = state(routing)
    out = routing(*inputs.qkv(2, 2, 33, 8))
    assert torch.isfinite(out).all()
    assert out.any()
    assert same(before, state(routing))


def test_a_centroid_begins_as_a_normalised_vector():
    centroids = module(init="paper").get_buffer("centroids")
    torch.testing.assert_close(centroids.square().mean(-1), torch.ones_like(centroids[..., 0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", [None, "suffix", "scattered"])
def test_running_means_follow_the_definition_over_several_steps(kind):
    routing = module(init="paper", decay=0.9, local_heads=0)
    counts, sums, centroids = (routing.get_buffer(name).clone() for name in ("ema_counts", "ema_sums", "centroids"))
    assert torch.equal(sums, centroids)
    assert torch.equal(counts, torch.ones_like(counts))
    for step in range(4):
        q, k, v = inputs.qkv(2, 2, 20, 8, seed=step)
        mask = None if kind is None else inputs.padding(2, 20, kind=kind, seed=step)
        routing(q, k, v, mask)
        counts, sums, centroids = oracle.ema_step(counts, sums, centroids, q, k, 0.9, mask)
        assert_exact(routing.get_buffer("ema_counts"), counts, "counts")
        assert_exact(routing.get_buffer("ema_sums"), sums, "sums")
        assert_exact(routing.get_buffer("centroids"), centroids, "centroids")


@pytest.mark.parametrize("init", ["lloyd", "paper"])
def test_a_cluster_that_nothing_chooses_keeps_its_place(init):
    """More clusters than the tokens of one group fill: no centroid may run away from the vectors."""
    routing = module(init=init, num_clusters=32)
    for seed in range(5):
        x = [1 + 0.1 * a + torch.eye(8)[0] for a in inputs.qkv(2, 2, 20, 8, seed=seed)]
        routing(*x)
        lengths = routing.get_buffer("centroids").square().mean(-1).sqrt()
        assert (routing.get_buffer("ema_counts") < 1).any() or init == "lloyd"
        assert lengths.max() < 1.01
        assert routing.auxiliary_loss() < 1e-4 * 8


def test_a_training_call_answers_with_the_centroids_it_found():
    routing = module(init="paper")
    x = inputs.qkv(2, 2, 33, 8)
    before = routing.eval()(*x)
    assert torch.equal(routing.train()(*x), before)
    assert not torch.equal(routing.eval()(*x), before)


def test_lloyd_init_ends_where_another_step_changes_nothing():
    routing = attention.build("routing", num_heads=1, head_dim=8, max_length=64, num_clusters=4, decay=0.999).double()
    torch.manual_seed(0)
    q, k, v = groups()
    routing(q, k, v)
    start = routing.get_buffer("centroids").clone()
    sums = torch.zeros_like(start)
    for x in (q, k):
        for h, c, vector in oracle.assignments(x, start):
            sums[h, c] += vector
    assert sums.any(-1).all()
    torch.testing.assert_close(
        start, oracle.normalised(sums), rtol=0, atol=1e-2
    )  # one step of the running mean followed
    assert routing.get_buffer("ema_counts").sum().item() == pytest.approx(128)


def test_lloyd_init_happens_once_and_in_training_only():
    routing = module(decay=0.999)
    x, y = inputs.qkv(2, 2, 33, 8), inputs.qkv(2, 2, 33, 8, seed=1)
    paper = state(routing)
    routing.eval()(*x)
    assert same(paper, state(routing))
    routing.train()(*x)
    first = routing.get_buffer("centroids").clone()
    routing(*y)
    change = (routing.get_buffer("centroids") - first).norm() / first.norm()
    assert 0 < change < 0.01  # one step of the running mean, and not a new start


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_call_that_finds_the_first_centroids_compiles_without_a_graph_break():
    """A break in the first call stays for all later ones: what is around the module is compiled once."""
    routing = module(torch.float32).cuda()
    assert not routing.ready
    torch.compile(routing, fullgraph=True, backend="eager")(*(x.float().cuda() for x in inputs.qkv(2, 2, 33, 8)))
    assert routing.ready


def test_lloyd_init_needs_no_more_than_the_tokens_there_are():
    for mask in (None, inputs.padding(1, 2, kind="one"), torch.zeros(1, 2, dtype=torch.bool)):
        routing = module(num_clusters=32)
        for _ in range(3):
            out = routing(*inputs.qkv(1, 2, 2, 8), mask)
            assert torch.isfinite(out).all()
            assert all(torch.isfinite(buffer).all() for buffer in routing.buffers())


@pytest.mark.parametrize("kind", ["suffix", "scattered", "one", "empty"])
def test_padding_reaches_neither_init_nor_running_means(kind):
    mask = inputs.padding(2, 20, kind=kind)
    padded = ~mask[:, None, :, None]
    states = []
    for seed in (1, 2):
        routing = module()
        junk = inputs.qkv(2, 2, 20, 8, seed=seed, scale=100.0)
        x = [a.where(~padded, b) for a, b in zip(inputs.qkv(2, 2, 20, 8), junk, strict=True)]
        torch.manual_seed(1)
        for _ in range(2):
            routing(*x, mask)
        states.append(state(routing))
    assert same(*states)


def test_a_saved_module_goes_on_as_if_never_stopped(tmp_path):
    x, y = inputs.qkv(2, 2, 33, 8), inputs.qkv(2, 2, 33, 8, seed=1)
    routing = module()
    routing(*x)
    torch.save(routing.state_dict(), tmp_path / "state.pt")
    resumed = module()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(routing(*y), resumed(*y))
    assert same(state(routing), state(resumed))


@pytest.mark.parametrize("init", ["lloyd", "paper"])
def test_a_module_saved_before_its_first_batch_still_begins_with_it(init):
    fresh, loaded = module(init=init), module(init=init)
    loaded(*inputs.qkv(2, 2, 33, 8))
    loaded.load_state_dict(fresh.state_dict())
    assert loaded.ready == fresh.ready == (init == "paper")
    for routing in (fresh, loaded):
        torch.manual_seed(3)
        routing(*inputs.qkv(2, 2, 33, 8, seed=1))
    assert same(state(loaded), state(fresh))


def test_the_auxiliary_loss_is_the_weighted_commitment_of_the_last_call():
    routing = module(init="paper", commitment_weight=0.25)
    q, k, v = inputs.qkv(2, 2, 20, 8, requires_grad=True)
    assert routing.auxiliary_loss().item() == 0
    mu = routing.get_buffer("centroids").clone()
    routing(q, k, v)
    expected = 0.25 * oracle.commitment(q, k, mu)
    assert_exact(routing.auxiliary_loss().detach(), expected.detach())
    ours, theirs = (torch.autograd.grad(loss, (q, k)) for loss in (routing.auxiliary_loss(), expected))
    for a, b in zip(ours, theirs, strict=True):
        assert_exact(a, b)
    assert not ours[0][:, 1].any()  # the local head


def test_state_stays_float32_under_half_precision_inputs():
    routing = module(torch.float32)
    x = inputs.qkv(2, 2, 20, 8, dtype=torch.bfloat16)
    assert routing(*x).dtype == torch.bfloat16
    assert {buffer.dtype for buffer in routing.buffers()} == {torch.float32}


def test_half_of_the_heads_are_local_by_default():
    for num_heads, routing_heads in ((1, 1), (2, 1), (5, 3), (8, 4)):
        routing = attention.build("routing", num_heads=num_heads, head_dim=8, max_length=8)
        assert len(routing.get_buffer("centroids")) == routing_heads


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(num_clusters=0), "attention.num_clusters=0 must be a positive integer"),
        (dict(window=2.5), "attention.window=2.5 must be a positive integer"),
        (dict(local_window=0), "attention.local_window=0 must be a positive integer"),
        (dict(local_heads=2), "attention.local_heads=2 must leave a routing head: 0 to 1 of 2"),
        (dict(local_heads=-1), "attention.local_heads=-1 must leave a routing head: 0 to 1 of 2"),
        (dict(commitment_weight=-1.0), "attention.commitment_weight=-1.0 must be a number, 0 or more"),
        (dict(decay=1.0), "attention.decay=1.0 must be a number, at least 0 and below 1"),
        (dict(decay="abc"), "attention.decay='abc' must be a number, at least 0 and below 1"),
        (dict(init="kmeans"), "attention.init=kmeans is unknown; use one of lloyd, paper"),
    ],
)
def test_bad_options_are_refused_in_one_line(option, message):
    with pytest.raises(ValueError, match="attention") as error:
        module(**option)
    assert str(error.value) == message


RANK = """
import sys, torch
from torch import distributed
from attention import build, routing as method
import inputs

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mine, mask = slice(2 * rank, 2 * rank + 2), inputs.padding(4, 33)
for name, init, method.LLOYD_STEPS in (("paper", "paper", 0), ("sample", "lloyd", 0), ("lloyd", "lloyd", 10)):
    torch.manual_seed(0)
    routing = build(
        "routing", num_heads=2, head_dim=8, max_length=64, num_clusters=4, window=8, local_window=8, init=init
    ).double()
    torch.manual_seed(rank)
    for step in range(2):
        routing(*(x[mine] for x in inputs.qkv(4, 2, 33, 8, seed=step)), mask[mine])
    torch.save(list(routing.buffers()), f"{folder}/{name}{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_ranks_move_their_centroids_as_one(tmp_path):
    script = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests' / 'support')]!r}\n{RANK}"
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    paper, sample, lloyd = (
        [torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1)] for name in ("paper", "sample", "lloyd")
    )
    assert same(*paper)
    assert same(*sample)
    assert same(*lloyd)
    whole = module(init="paper")
    for step in range(2):
        whole(*inputs.qkv(4, 2, 33, 8, seed=step), inputs.padding(4, 33))
    for ours, theirs in zip(paper[0], state(whole), strict=True):
        assert_exact(ours, theirs)


def test_what_ranks_share_is_part_of_one_compiled_graph(tmp_path):
    """A break of the graph there would part the compiled step in every layer."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        plain, compiled = module(init="paper"), module(init="paper")
        call = torch.compile(compiled, fullgraph=True, backend="eager")
        for seed in range(2):
            tokens = inputs.qkv(2, 2, 33, 8, seed=seed)
            assert_exact(call(*tokens), plain(*tokens))
        assert same(state(compiled), state(plain))
    finally:
        distributed.destroy_process_group()
