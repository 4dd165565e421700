"""AdaMRA's kernels compute what the reference computes: interpreted without a GPU, native with one."""

from functools import partial

import pytest
import torch
from guards import guarded_allocations, guarded_qkv
from inputs import padding, qkv
from replay import replayed
from sm90 import assert_compiles, tiers
from tolerance import assert_as_good_as, assert_exact
from torch import Tensor

import attention
from kernels.adamra import adamra, measure, reference
from kernels.lln import triton_moments
from kernels.lln.moments import PUBLISHED

NATIVE = torch.cuda.is_available()
HEADS = 2
CASES = [
    (1, None, 8, "top1", (2, 8, 32)),
    (100, "scattered", 16, "top1", (2, 8, 32)),
    (129, "suffix", 24, "top1_unscaled", (1, 4)),
    pytest.param(100, "scattered", 32, "top1", (2, 8, 32), marks=pytest.mark.slow),
    (33, "empty", 16, "fixed", (2, 64)),
    (130, None, 16, "top1", (8, 32, 128)),
    (128, None, 16, "top1", (2, 8, 32)),
    pytest.param(70, "one", 64, "top1", (1,), marks=pytest.mark.slow),
    pytest.param(70, "suffix", 128, "top1", (2, 8, 32), marks=pytest.mark.slow),
]
gpu = pytest.mark.gpu
native_only = pytest.mark.skipif(not NATIVE, reason="needs a GPU")


def router_weights(count: int, dim: int) -> Tensor:
    return torch.randn(HEADS, count, dim, generator=torch.Generator().manual_seed(3))


def evaluate(
    inputs: list[Tensor], mask: Tensor | None, gate: str, rates: tuple[int, ...], impl: str, dtype: torch.dtype, device
) -> list[Tensor]:
    """Output, balance loss, then gradients of q, k, v and router, for the inputs converted to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    mask = None if mask is None else mask.to(device)
    count, none = len(rates), [None] * len(rates)
    router = router_weights(count, inputs[0].shape[-1]).to(device, wide).requires_grad_()
    scales = tuple(torch.linspace(a, b, count).to(device, wide) for a, b in ((1.5, 0.7), (0.8, 1.9)))
    out, balance = adamra(
        *inputs, mask, router=None if gate == "fixed" else router, rates=rates, key_weights=none, value_weights=none,
        scales=scales, gate=gate, balance_weight=0.3, impl=impl,
    )  # fmt: skip
    leaves = inputs if gate == "fixed" else [*inputs, router]
    cotangent = qkv(*out.shape, seed=7)[0].to(device, dtype)
    return [out.detach(), balance.detach(), *torch.autograd.grad((out * cotangent).sum() + 10 * balance, leaves)]


NAMES = ("out", "balance", "dq", "dk", "dv", "drouter")


@pytest.mark.skipif(NATIVE, reason="float64 runs in the interpreter only")
@pytest.mark.parametrize(("length", "kind", "dim", "gate", "rates"), CASES)
def test_output_loss_and_gradients_are_those_of_the_reference_in_float64(length, kind, dim, gate, rates):
    inputs, mask = qkv(2, HEADS, length, dim), None if kind is None else padding(2, length, kind=kind)
    mine, theirs = (evaluate(inputs, mask, gate, rates, x, torch.float64, "cpu") for x in ("triton", "reference"))
    assert mine[0].transpose(1, 2).is_contiguous()
    assert_exact(mine[0], theirs[0], "out")
    assert_exact(mine[1], theirs[1], "balance")
    assert_exact(*(torch.cat([g.flatten() for g in r[2:5]]) for r in (mine, theirs)), "gradient of q, k, v")
    for actual, expected in zip(mine[5:], theirs[5:], strict=True):
        assert_exact(actual, expected, "gradient of the router")
    if mask is not None:
        padded = ~mask[:, None, :, None].expand_as(inputs[0])
        assert all((x[padded] == 0).all() for x in (mine[0], *mine[2:5]))


@pytest.mark.skipif(NATIVE, reason="float64 runs in the interpreter only")
def test_a_part_of_several_tiles_gathers_its_queries_from_longer_lists(monkeypatch):
    from kernels.adamra import triton

    monkeypatch.setattr(triton, "PROGRAMS", 1)  # one part a head
    monkeypatch.setattr(triton, "LIST_BLOCK", 64)
    inputs, mask = qkv(1, HEADS, 300, 8), padding(1, 300, kind="scattered")
    mine, theirs = (evaluate(inputs, mask, "top1", (2, 8), x, torch.float64, "cpu") for x in ("triton", "reference"))
    for name, actual, expected in zip(NAMES, mine, theirs, strict=True):
        assert_exact(actual, expected, name)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[gpu, native_only])],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize(("length", "kind", "dim", "gate", "rates"), [CASES[i] for i in (1, 5)])
def test_error_is_at_most_twice_that_of_plain_pytorch(length, kind, dim, gate, rates, dtype, device):
    inputs = [x.to(dtype) for x in qkv(4, HEADS, length, dim)]
    mask = None if kind is None else padding(4, length, kind=kind)
    exact = evaluate(inputs, mask, gate, rates, "reference", torch.float64, "cpu")
    plain = evaluate(inputs, mask, gate, rates, "reference", dtype, device)
    mine = evaluate(inputs, mask, gate, rates, "triton", dtype, device)
    for name, actual, other, value in zip(NAMES, mine, plain, exact, strict=True):
        assert_as_good_as(actual, other, value, name)


def test_equal_logits_choose_the_first_resolution(device):
    from kernels.adamra import ops

    q, k, v = (x.to(device, torch.float32) for x in qkv(1, HEADS, 20, 8))
    router = torch.zeros(HEADS, 3, 8, device=device)
    router[:, 1:, 0] = 1.0  # resolutions 1 and 2 tie
    scale = torch.ones(3, device=device)
    _, _, _, _, choice, _ = ops.forward(q, k, v, None, router, scale, scale, [2, 8, 32], True, 1.0)
    _, one_hot = reference.route(q, router)
    assert torch.equal(choice.view(1, HEADS, 20).long(), one_hot.long().argmax(-1))
    assert set(choice.flatten().tolist()) == {0, 1}


@pytest.mark.skipif(NATIVE, reason="float64 runs in the interpreter only")
def test_gradcheck():
    inputs, mask = qkv(1, 1, 5, 8, requires_grad=True), torch.tensor([[True, True, False, True, True]])
    router = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    scales = (torch.tensor([1.3, 0.8]).double(), torch.tensor([0.9, 1.1]).double())

    def call(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        none = [None, None]
        options = dict(rates=(2, 4), key_weights=none, value_weights=none, scales=scales, impl="triton")
        return adamra(q, k, v, mask, router=w, **options)

    assert torch.autograd.gradcheck(call, (*inputs, router), fast_mode=True)


@pytest.mark.parametrize(("length", "kind", "dim"), [(100, "scattered", 24)])
def test_kernels_stay_in_their_buffers_and_fill_them(length, kind, dim, device):
    mask = None if kind is None else padding(2, length, kind=kind).to(device)
    leaves = guarded_qkv(2, HEADS, length, dim, mask, device)
    router = torch.randn(HEADS, 3, dim, device=device).requires_grad_()
    options = dict(rates=(2, 8, 32), key_weights=[None] * 3)
    with guarded_allocations():
        scales = measure(*leaves[:2], mask, PUBLISHED, **options, impl="triton")
        more = dict(router=router, value_weights=[None] * 3, scales=scales[2:], impl="triton")
        out, balance = adamra(*leaves, mask, **options, **more)
        gradients = torch.autograd.grad(out.square().sum() + balance, [*leaves, router])
    assert all(x.isfinite().all() for x in (out, balance, *gradients, *scales))
    plain = measure(*[x.nan_to_num() for x in leaves[:2]], mask, PUBLISHED, **options, impl="reference")
    for mine, other in zip(scales, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=0)


# With and without a gap: tiles of real tokens alone are summed without weights. Both tiles of a head are one part.
@pytest.mark.parametrize(("length", "kind"), [(256, None), (200, None), (200, "scattered")])
def test_measured_spreads_do_not_cancel_where_the_mean_is_large(length, kind, device, monkeypatch):
    monkeypatch.setattr(triton_moments, "split", partial(triton_moments.split, programs=1))
    q, k = (x + 100 for x in qkv(3, HEADS, length, 32)[:2])
    mask, options = (
        None if kind is None else padding(3, length, kind=kind),
        dict(rates=(2, 8, 32), key_weights=[None] * 3),
    )
    expected = measure(q.double(), k.double(), mask, PUBLISHED, **options, impl="reference")
    arguments = (x if x is None else x.to(device) for x in (q.float(), k.float(), mask))
    for mine, exact in zip(measure(*arguments, PUBLISHED, **options, impl="triton"), expected, strict=True):
        torch.testing.assert_close(mine.double().cpu(), exact, rtol=1e-5, atol=0)


def test_operators_pass_opcheck(device):
    from kernels.adamra import ops

    q, k, v = (x.to(device, torch.float32) for x in qkv(1, HEADS, 9, 8))
    mask, scale = padding(1, 9, kind="scattered").to(device), torch.ones(2, device=device)
    router, options = torch.randn(HEADS, 2, 8, device=device), ([2, 4], True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.forward, (q, k, v, mask, router, scale, scale, *options, 0.5), test_utils=checks)
    out, balance, *state = ops.forward(q, k, v, mask, router, scale, scale, *options, 0.5)
    arguments = (out, balance, q, k, v, mask, router, scale, scale, *state, *options)
    torch.library.opcheck(ops.backward, arguments, test_utils=checks)


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    module = attention.build("adamra", num_heads=HEADS, head_dim=8, max_length=64, impl="triton").to(device)
    inputs = [x.to(device, torch.float32).requires_grad_() for x in qkv(2, HEADS, 20, 8)]
    leaves = [*inputs, module.router]

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return module(q, k, v, mask).square().sum() + module.auxiliary_loss()

    compiled = torch.compile(call, fullgraph=True)
    for mask in (None, padding(2, 20).to(device)):
        for mine, other in zip(*(torch.autograd.grad(f(*inputs, mask), leaves) for f in (compiled, call)), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    "options",
    [dict(feature_map="elu"), dict(compress="conv"), dict(gate="soft"), dict(rates=(2, 3)), dict(rates=(256,))],
)
def test_variants_without_kernels_are_refused_in_one_line_and_run_the_reference_otherwise(options):
    sizes = dict(num_heads=2, head_dim=8, max_length=8)
    with pytest.raises(ValueError, match=r"^attention\.impl=triton of adamra .+; use attention\.impl=reference$"):
        attention.build("adamra", impl="triton", **sizes, **options)
    assert attention.build("adamra", **sizes, **options).implementation(torch.device("cuda")) == "reference"
    assert attention.build("adamra", **sizes).implementation(torch.device("cuda")) == "triton"


# Pairwise: the product of gates, rates, dimensions, dtypes and masks is half an hour of compiling. float32 at D = 128
# takes minutes alone.
GRID = [
    ["adamra", {"gate": "fixed", "rates": (1, 2)}, 8, "float16", False],
    ["adamra", {"gate": "top1_unscaled", "rates": (8, 32, 128)}, 128, "bfloat16", True],
    ["adamra", {}, 32, "bfloat16", False, 64],  # heads of one part
]


@tiers([["adamra", {}, 32, "bfloat16", True]], GRID)
def test_kernels_compile_for_an_h100_and_fit_its_shared_memory(cases):
    assert_compiles(cases, {"queries", "balance", "keys_and_router_backward"})


def undecided(q: Tensor, router: Tensor) -> Tensor:
    """Tokens (B, N) of which some head can hardly tell the two best resolutions apart: rounding may choose either."""
    best = torch.einsum("bhnd,hrd->bhnr", q.double().cpu(), router.double().cpu()).topk(2).values
    return (best[..., 0] - best[..., 1] < 1e-3).any(1)


@gpu
@native_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(8, 4096), (80, 512)], ids=["parts", "whole"])
def test_large_call_is_right_on_the_same_choices(batch, length, dtype, masked, device):
    inputs, rates = [x.to(dtype) for x in qkv(batch, HEADS, length, 32)], (2, 8, 32)
    mask = ~undecided(inputs[0], router_weights(3, 32))
    if masked:
        mask &= padding(batch, length)
    exact = evaluate(inputs, mask, "top1", rates, "reference", torch.float64, device)
    plain = evaluate(inputs, mask, "top1", rates, "reference", dtype, device)
    mine = evaluate(inputs, mask, "top1", rates, "triton", dtype, device)
    for name, actual, other, value in zip(NAMES, mine, plain, exact, strict=True):
        assert_as_good_as(actual, other, value, name)


@gpu
@native_only
def test_large_bf16_call_repeats_every_bit_and_can_be_captured():
    module = attention.build("adamra", num_heads=2, head_dim=32, max_length=4096, impl="triton").cuda()
    inputs = [x.cuda().requires_grad_() for x in qkv(32, 2, 4096, 32, dtype=torch.bfloat16)]
    leaves, mask = [*inputs, module.router], padding(32, 4096).cuda()

    def step() -> list[Tensor]:
        out = module(*inputs, mask)
        gradients = torch.autograd.grad(out.float().square().sum() + module.auxiliary_loss(), leaves)
        module._auxiliary = None  # it would keep the graph, whose nodes belong to a stream that is not the capture's
        return [out.detach(), *gradients]

    first, second = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(replayed(step), first, strict=True))
