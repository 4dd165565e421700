"""Routing's kernels compute what the reference computes: interpreted without a GPU, native with one."""

import pytest
import torch
from guards import guarded_allocations, guarded_qkv
from inputs import padding, qkv
from replay import replayed
from sm90 import assert_compiles, tiers
from tolerance import assert_as_good_as, assert_exact
from torch import Tensor

import attention
from kernels.routing import reference, routing_attention, select
from kernels.routing.centroids import cluster_scores, layer_norm, zero_padding

NATIVE = torch.cuda.is_available()
WIDEST = torch.float32 if NATIVE else torch.float64  # the GPU's kernels have no float64
HEADS = 2
# Length, mask, head dimension, clusters, window, local block, causal: one tile and several of each.
CASES = [
    (1, None, 8, 2, 4, 3, False),
    (50, "scattered", 16, 3, 40, 25, False),
    (34, "empty", 24, 3, 6, 40, True),
    (33, None, 32, 3, 12, 16, False),
    pytest.param(33, None, 8, 3, 9, 8, True, marks=pytest.mark.slow),
    pytest.param(40, "suffix", 16, 33, 5, 64, False, marks=pytest.mark.slow),
    pytest.param(70, "one", 64, 3, 16, 30, False, marks=pytest.mark.slow),
    pytest.param(70, "suffix", 128, 2, 70, 50, True, marks=pytest.mark.slow),
    pytest.param(140, None, 16, 130, 7, 128, False, marks=pytest.mark.slow),
]
NAMES = ("out", "dq", "dk", "dv", "commitment", "counts", "sums")
gpu = pytest.mark.gpu
native_only = pytest.mark.skipif(not NATIVE, reason="needs a GPU")
interpreted_only = pytest.mark.skipif(NATIVE, reason="float64 runs in the interpreter only")


def call_of(length: int, kind: str | None, dim: int) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v of two sequences and their mask, or of one sequence without."""
    if kind is None:
        return qkv(1, HEADS, length, dim), None
    return qkv(2, HEADS, length, dim), padding(2, length, kind=kind)


def centroids(clusters: int, dim: int, heads: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return layer_norm(torch.randn(heads, clusters, dim, generator=generator, dtype=torch.float64))


def selection(inputs: list[Tensor], mask: Tensor | None, mu: Tensor, window: int) -> Tensor:
    """Positions of the members of each cluster as the kernels choose them, (2, B, H_r, K, w), queries first."""
    return select(*inputs[:2], mu.to(inputs[0].device), window=window, key_mask=mask, impl="triton")


def evaluate(
    inputs: list[Tensor], mask: Tensor | None, mu: Tensor, impl: str, dtype: torch.dtype, device: str, *, window: int,
    local_window: int, causal: bool, members: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """What NAMES names, for the inputs converted to `dtype`; the reference can be told the members of the clusters."""
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    mask = None if mask is None else mask.to(device)
    mu = mu.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    options = dict(window=window, local_window=local_window, key_mask=mask, causal=causal, impl=impl)
    members = None if members is None else members.to(device)
    out, commitment, counts, sums = routing_attention(*inputs, mu, **options, members=members)
    cotangent = qkv(*out.shape, seed=7)[0].to(device, dtype)
    gradients = torch.autograd.grad((out * cotangent).sum() + 3 * commitment, inputs)
    return [out.detach(), *gradients, commitment.detach(), counts, sums]


@pytest.mark.parametrize(("length", "kind", "dim", "clusters", "window", "local_window", "causal"), CASES)
@interpreted_only
def test_everything_is_that_of_the_reference_in_float64(
    length, kind, dim, clusters, window, local_window, causal
):  # fmt: skip
    inputs, mask = call_of(length, kind, dim)
    options = dict(window=window, local_window=local_window, causal=causal)
    mine, theirs = (
        evaluate(inputs, mask, centroids(clusters, dim), impl, torch.float64, "cpu", **options)
        for impl in ("triton", "reference")
    )
    assert mine[0].transpose(1, 2).is_contiguous()
    assert_exact(*(torch.cat([g.flatten() for g in r[1:4]]) for r in (mine, theirs)), "gradient of q, k, v")
    for i in (0, 4, 5, 6):
        assert_exact(mine[i], theirs[i], NAMES[i])
    if mask is not None:
        padded = ~mask[:, None, :, None].expand_as(inputs[0])
        assert all((x[padded] == 0).all() for x in mine[:4])


def shorten_tiles(monkeypatch: pytest.MonkeyPatch, warp_keys: int) -> None:
    """Let short rows be read as long ones are: in tiles, and with a list of candidates if that fits in one."""
    monkeypatch.setattr("kernels.routing.triton_select.WARP_KEYS", warp_keys)
    monkeypatch.setattr("kernels.routing.triton_select.MIN_CANDIDATES", 8)


@pytest.mark.parametrize("kind", [None, "scattered", "one", "empty"])
@interpreted_only
def test_members_are_those_of_the_reference(kind):
    length, window = 45, 12
    inputs, mask = qkv(2, HEADS, length, 8), None if kind is None else padding(2, length, kind=kind)
    mu = centroids(3, 8, HEADS)
    mine = selection(inputs, mask, mu, window)
    for x, index in zip(inputs, mine, strict=False):
        scores = cluster_scores(layer_norm(zero_padding(x, mask)), mu)
        assert torch.equal(index, reference.membership(scores, window, mask))


@pytest.mark.parametrize(("window", "warp_keys"), [(5, 16), (12, 4)], ids=["listed", "streamed"])
@interpreted_only
def test_members_of_a_row_of_several_tiles_are_those_of_the_reference(window, warp_keys, monkeypatch):
    shorten_tiles(monkeypatch, warp_keys)
    inputs, mask, mu = [x.float() for x in qkv(1, 1, 45, 8)], padding(1, 45, kind="scattered"), centroids(1, 8)
    for x, index in zip(inputs, selection(inputs, mask, mu, window), strict=False):
        scores = cluster_scores(layer_norm(zero_padding(x, mask)), mu.float())
        assert torch.equal(index, reference.membership(scores, window, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize(("copies", "window", "warp_keys"), [(6, 8, 1024), (15, 4, 16)])
def test_equal_scores_go_to_the_lower_position(copies, window, warp_keys, dtype, device, monkeypatch):
    shorten_tiles(monkeypatch, warp_keys)
    few = torch.randn(1, 1, 30 // copies, 8, generator=torch.Generator().manual_seed(1))
    x = few.repeat(1, 1, copies, 1).to(device, dtype)
    scores = cluster_scores(layer_norm(x.double().cpu()), centroids(1, 8))
    expected = reference.membership(scores.float(), window)
    for index in selection([x, x], None, centroids(1, 8), window):
        assert torch.equal(index.cpu(), expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=[gpu, native_only])],
    ids=["fp16", "fp32", "bf16"],
)
def test_no_token_is_left_out_for_a_worse_one(dtype, device):
    """By more than one step of the keys: 2⁻¹⁵ √D |μ| in half precisions, rounding in float32."""
    length, window, dim = 100, 20, 16
    inputs, mask = (
        [x.to(device, dtype) for x in qkv(2, 1, length, dim)],
        padding(2, length, kind="scattered").to(device),
    )
    mu = centroids(4, dim).to(device)
    step = (2**-15 if dtype.itemsize == 2 else 2**-20) * dim**0.5 * mu.norm(dim=-1)
    for x, index in zip(inputs, selection(inputs, mask, mu, window), strict=False):
        scores = cluster_scores(layer_norm(x.double()), mu).masked_fill(~mask[:, None, None], -torch.inf)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)
        worst = scores.masked_fill(~chosen, torch.inf).amin(-1)
        best_left = scores.masked_fill(chosen, -torch.inf).amax(-1)
        assert (chosen.sum(-1) == window).all()
        assert (worst >= best_left - step).all()


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[gpu, native_only])],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize(
    ("length", "kind", "dim", "clusters", "window", "local_window", "causal"),
    [CASES[3], pytest.param(*CASES[1], marks=pytest.mark.slow)],
)
def test_error_is_at_most_twice_that_of_plain_pytorch_on_the_same_selection(
    length, kind, dim, clusters, window, local_window, causal, dtype, device
):
    inputs, mask = call_of(length, kind, dim)
    inputs, mu = [x.to(dtype) for x in inputs], centroids(clusters, dim)
    members = selection([x.to(device) for x in inputs], None if mask is None else mask.to(device), mu, window)
    options = dict(window=window, local_window=local_window, causal=causal)
    exact = evaluate(inputs, mask, mu, "reference", torch.float64, "cpu", members=members, **options)
    plain = evaluate(inputs, mask, mu, "reference", dtype, device, members=members, **options)
    mine = evaluate(inputs, mask, mu, "triton", dtype, device, **options)
    for name, actual, other, value in zip(NAMES, mine, plain, exact, strict=True):
        assert actual.dtype == other.dtype
        if name in ("commitment", "sums"):  # kept in float32, where the order of a sum decides the last bits
            assert_as_good_as(actual.to(torch.float16), other.to(torch.float16), value, name)
        else:
            assert_as_good_as(actual, other, value, name)


@interpreted_only
def test_gradcheck():
    mask, mu = torch.tensor([[True, True, False, True, True]]), centroids(2, 8)

    def call(qkv: Tensor) -> Tensor:  # one input and one output: every further one costs two calls
        result = routing_attention(*qkv.unbind(), mu, window=3, local_window=8, key_mask=mask, impl="triton")
        return torch.cat([result.out.flatten(), result.commitment[None]])

    assert torch.autograd.gradcheck(call, torch.stack(qkv(1, 2, 5, 8)).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize(
    ("length", "kind", "dim", "window", "causal"),
    [(50, "scattered", 24, 10, False), pytest.param(70, None, 8, 70, True, marks=pytest.mark.slow)],
)
def test_kernels_stay_in_their_buffers_and_fill_them(length, kind, dim, window, causal, device):
    mask = None if kind is None else padding(2, length, kind=kind).to(device)
    leaves = guarded_qkv(2, HEADS, length, dim, mask, device)
    mu = centroids(3, dim).to(device, torch.float32)
    with guarded_allocations():
        result = routing_attention(
            *leaves, mu, window=window, local_window=20, key_mask=mask, causal=causal, impl="triton"
        )
        gradients = torch.autograd.grad(result.out.square().sum() + result.commitment, leaves)
    assert all(x.isfinite().all() for x in (*result, *gradients))


def test_training_moves_the_centroids_as_the_reference_does(device):
    modules = [
        attention.build(
            "routing", num_heads=HEADS, head_dim=8, max_length=40, num_clusters=3, window=8, init="paper", impl=impl
        ).to(device)
        for impl in ("triton", "reference")
    ]
    modules[1].load_state_dict(modules[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(module.buffers() for module in modules), strict=True))
    inputs = [x.to(device, torch.float32).requires_grad_() for x in qkv(1, HEADS, 20, 8)]
    for module in modules:
        out = module(*inputs)
        (out.sum() + module.auxiliary_loss()).backward()  # after the centroids have moved
    for mine, theirs in zip(*(module.buffers() for module in modules), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_operators_pass_opcheck(device):
    from kernels.routing import ops

    q, k, v = (x.to(device, torch.float32) for x in qkv(1, HEADS, 9, 8))
    mask, mu = padding(1, 9, kind="scattered").to(device), centroids(2, 8).to(device, torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.forward, (q, k, v, mask, mu, 4, 16, False), test_utils=checks)
    out, commitment, _, _, *state = ops.forward(q, k, v, mask, mu, 4, 16, False)
    torch.library.opcheck(
        ops.move, (mu[..., 0] ** 2, mu.clone(), mu.clone(), mu[..., 1] ** 2, mu, 0.9), test_utils=checks
    )
    torch.library.opcheck(ops.backward, (out, commitment, q, k, v, mask, out, *state, 16, False), test_utils=checks)


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    module = attention.build(
        "routing", num_heads=HEADS, head_dim=8, max_length=64, num_clusters=2, window=8, init="paper", impl="triton"
    ).to(device)
    inputs = [x.to(device, torch.float32).requires_grad_() for x in qkv(2, HEADS, 20, 8)]

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return module(q, k, v, mask).square().sum() + module.auxiliary_loss()

    compiled, start = torch.compile(call, fullgraph=True), {n: x.clone() for n, x in module.state_dict().items()}
    for mask in (None, padding(2, 20).to(device)):
        results = []
        for run in (compiled, call):
            module.load_state_dict(start)
            results.append([*torch.autograd.grad(run(*inputs, mask), inputs), *(x.clone() for x in module.buffers())])
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other)


def test_what_the_kernels_cannot_do_is_refused_in_one_line(device):
    q, k, v = (x.to(device, torch.float32) for x in qkv(1, 1, 4, 256))
    with pytest.raises(ValueError, match=r"^attention\.impl=triton of routing takes head_dim <= 128, got 256.*$"):
        routing_attention(q, k, v, centroids(2, 256).to(q), window=2, local_window=2, impl="triton")
    q, k, v, mu = q[..., :8], k[..., :8], v[..., :8], centroids(2, 8).to(q)
    given = select(q, k, mu, window=2)
    with pytest.raises(ValueError, match=r"^attention\.impl=triton of routing chooses the members itself; .*$"):
        routing_attention(q, k, v, mu, window=2, local_window=2, impl="triton", members=given)


# --- compiled for an H100, in a process of its own: this one interprets


# A Latin square of selections, dtypes and dimensions; the largest selection has the largest tiles.
SELECTIONS = ((16, 64, 128, False), (40, 128, 64, True), (200, 200, 200, True))
DIMS, DTYPES = (24, 128, 64), ("bfloat16", "float16", "float32")
GRID = [
    [
        "routing", {"num_clusters": clusters, "window": window, "local_window": local_window},
        DIMS[(row + column) % len(DIMS)], dtype, masked,
    ]
    for row, (clusters, window, local_window, masked) in enumerate(SELECTIONS)
    for column, dtype in enumerate(DTYPES)
]  # fmt: skip
DEFAULT = [
    ["routing", {"num_clusters": 32, "local_window": 128}, 32, "bfloat16", False],
    ["routing", {"num_clusters": 16, "window": 200}, 64, "bfloat16", True],  # several tiles a cluster
]


@tiers(DEFAULT, GRID)
def test_kernels_compile_for_an_h100_and_fit_its_shared_memory(cases):
    chosen = {"score", "merge", "select", "offsets", "cluster", "combine", "cluster_backward", "finish", "move"}
    # The smallest selection has 8 bytes of stack.
    assert_compiles(cases, {*chosen, "local", "local_backward"}, spills=8)


# --- on the GPU only


@gpu
@native_only
@pytest.mark.parametrize(
    ("length", "clusters", "window"), [(1024, 16, 64), (4096, 32, 128), (16384, 128, 128), (20000, 16, 300)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_large_bf16_call_is_right_repeats_every_bit_and_can_be_captured(length, clusters, window, masked):
    batch = 65536 // length
    inputs = [x.cuda() for x in qkv(batch, 2, length, 32, dtype=torch.bfloat16)]
    cotangent = qkv(batch, 2, length, 32, seed=5, dtype=torch.bfloat16)[0].cuda()
    mask, mu = padding(batch, length).cuda() if masked else None, centroids(clusters, 32).float().cuda()
    options = dict(window=window, local_window=128, key_mask=mask)

    def step(dtype: torch.dtype = torch.bfloat16, impl: str = "triton", members: Tensor | None = None) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]  # fresh: a capture must not meet old nodes
        mu_of = mu.double() if dtype == torch.float64 else mu
        result = routing_attention(*leaves, mu_of, **options, impl=impl, members=members)
        loss = (result.out * cotangent.to(dtype)).sum() + result.commitment
        return [x.detach() for x in (result.out, *torch.autograd.grad(loss, leaves), *result[1:])]

    members = selection(inputs, mask, mu, window)
    mine, again = step(), step()
    for name, a, b in zip(NAMES, mine, again, strict=True):
        assert torch.equal(a, b), f"{name} differs between two runs"
    other, exact = (step(dtype, "reference", members) for dtype in (torch.bfloat16, torch.float64))
    for name, a, p, e in list(zip(NAMES, mine, other, exact, strict=True))[:4]:
        assert_as_good_as(a, p, e, name)

    assert all(torch.equal(a, b) for a, b in zip(replayed(step), mine, strict=True))
