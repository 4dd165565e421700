"""LLN's kernels compute what the reference computes: interpreted where there is no GPU, native where there is one."""

import pytest
import torch
from gradients import assert_compiles_whole
from guards import guarded_allocations, guarded_qkv
from inputs import padding, qkv
from oracles import lln as oracle
from replay import replayed
from sm90 import assert_compiles, tiers, twofold_addresses
from tolerance import assert_as_good_as, assert_exact
from torch import Tensor

import attention
from kernels.lln import lln, measure
from kernels.lln.moments import PUBLISHED

NATIVE = torch.cuda.is_available()
WIDEST = torch.float32 if NATIVE else torch.float64  # the GPU's kernels have no float64
HEADS = 2
NAMES = ("lln", "lln_diag")
# Length, mask, head dimension, diag: every padding of D, every kind of mask, one tile and several parts.
CASES = [
    (1, None, 8, "average"),
    (33, "one", 32, "none"),
    (100, "scattered", 16, "average"),
    (127, "empty", 24, "learnable_scale"),
    (129, "suffix", 32, "average"),
    (130, None, 32, "none"),
    (128, None, 16, "none"),
    pytest.param(70, "suffix", 64, "learnable_ratio", marks=pytest.mark.slow),
    pytest.param(64, "scattered", 128, "none", marks=pytest.mark.slow),
]
gpu = pytest.mark.gpu
native_only = pytest.mark.skipif(not NATIVE, reason="needs a GPU")


def mixture(diag: str, dim: int, dtype: torch.dtype) -> tuple | None:
    """Weights of the two branches; random leaves where they are learned."""
    if diag in ("none", "average"):
        return None if diag == "none" else (0.5, 0.5)
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.rand(1, HEADS, 1, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(2)
    )


def evaluate(inputs: list[Tensor], mask: Tensor | None, mix: tuple | None, impl: str, dtype: torch.dtype, device: str):
    """Output, then gradients of q, k, v and learned weights, for the inputs converted to `dtype`."""
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if mix is not None:
        mix = tuple(w.detach().to(device, wide).requires_grad_() if isinstance(w, Tensor) else w for w in mix)
    leaves = inputs + [w for w in mix or () if isinstance(w, Tensor)]
    alpha, beta = torch.tensor([1.7], device=device, dtype=wide), torch.tensor([2.1], device=device, dtype=wide)
    mask = None if mask is None else mask.to(device)
    out = lln(*inputs, mask, alpha=alpha, beta=beta, mix=mix, impl=impl)
    cotangent = qkv(*out.shape, seed=7)[0].to(device, dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def names(results: list[Tensor]) -> list[str]:
    return ["out", "dq", "dk", "dv", "dw_lln", "dw_diag"][: len(results)]


@pytest.mark.skipif(NATIVE, reason="float64 runs in the interpreter only")
@pytest.mark.parametrize(("length", "kind", "dim", "diag"), CASES)
def test_output_and_gradients_are_those_of_the_reference_in_float64(length, kind, dim, diag):
    inputs, mask = qkv(2, HEADS, length, dim), None if kind is None else padding(2, length, kind=kind)
    mix = mixture(diag, dim, torch.float64)
    mine, theirs = (evaluate(inputs, mask, mix, impl, torch.float64, "cpu") for impl in ("triton", "reference"))
    assert mine[0].transpose(1, 2).is_contiguous()
    assert_exact(mine[0], theirs[0], "out")
    # As one vector: with one token the gradients of q and k are zero but for rounding.
    assert_exact(*(torch.cat([g.flatten() for g in r[1:4]]) for r in (mine, theirs)), "gradient of q, k, v")
    for name, actual, expected in zip(names(mine)[4:], mine[4:], theirs[4:], strict=True):
        assert_exact(actual, expected, name)
    if mask is not None:
        padded = ~mask[:, None, :, None].expand_as(inputs[0])
        assert all((x[padded] == 0).all() for x in mine[:4])


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[gpu, native_only])],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize(("length", "kind", "dim", "diag"), [CASES[i] for i in (2, 5)])
def test_error_is_at_most_twice_that_of_plain_pytorch(length, kind, dim, diag, dtype, device):
    inputs = [x.to(dtype) for x in qkv(2, HEADS, length, dim)]
    mask, mix = None if kind is None else padding(2, length, kind=kind), mixture(diag, dim, torch.float32)
    exact = evaluate(inputs, mask, mix, "reference", torch.float64, "cpu")
    plain = evaluate(inputs, mask, mix, "reference", dtype, device)
    mine = evaluate(inputs, mask, mix, "triton", dtype, device)
    for name, actual, other, value in zip(names(mine), mine, plain, exact, strict=True):
        assert actual.dtype == other.dtype
        assert_as_good_as(actual, other, value, name)


@pytest.mark.skipif(NATIVE, reason="float64 runs in the interpreter only")
@pytest.mark.parametrize("diag", ["none", "learnable_scale"])
def test_gradcheck(diag):
    inputs, mask = qkv(1, 1, 5, 8, requires_grad=True), torch.tensor([[True, True, False, True, True]])
    mix = mixture(diag, 8, torch.float64)
    weights = [w[:, :1].detach().requires_grad_() for w in mix or ()]
    one = torch.ones(1, dtype=torch.float64)

    def call(q: Tensor, k: Tensor, v: Tensor, *w: Tensor) -> Tensor:
        return lln(q, k, v, mask, alpha=1.3 * one, beta=0.9 * one, mix=w or None, impl="triton")

    assert torch.autograd.gradcheck(call, (*inputs, *weights), fast_mode=True)


@pytest.mark.parametrize(
    ("length", "kind", "dim", "diag"),
    [(100, "scattered", 24, "average"), (130, None, 16, "none"), (70, "one", 32, "average")],
)
def test_kernels_stay_in_their_buffers_and_fill_them(length, kind, dim, diag, device):
    mask = None if kind is None else padding(2, length, kind=kind).to(device)
    leaves = guarded_qkv(2, HEADS, length, dim, mask, device)
    with guarded_allocations():
        scales = measure(*leaves[:2], mask, PUBLISHED, impl="triton")
        out = lln(*leaves, mask, alpha=scales[2], beta=scales[3], mix=mixture(diag, dim, torch.float32), impl="triton")
        gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *gradients, *scales))
    plain = measure(*[x.nan_to_num() for x in leaves[:2]], mask, PUBLISHED, impl="reference")
    for mine, other in zip(scales, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("length", "kind"), [(50, None), (256, None), (50, "suffix"), (50, "empty"), (50, "one")])
def test_measured_scales_are_those_of_the_definition(length, kind, device):
    q, k, _ = qkv(3, HEADS, length, 24)
    q, k = (3 * q + 100).to(device, WIDEST), k.to(device, WIDEST)  # a mean far from zero
    mask = torch.ones(3, length, dtype=torch.bool) if kind is None else padding(3, length, kind=kind)
    _, _, alpha, beta = measure(q, k, None if kind is None else mask.to(device), PUBLISHED, impl="triton")
    expected = oracle.scales(q.double().cpu(), k.double().cpu(), mask, *PUBLISHED)
    for mine, other in zip((alpha, beta), expected, strict=True):
        torch.testing.assert_close(mine.double().cpu(), other, rtol=1e-4 if NATIVE else 1e-12, atol=0)


def test_scales_of_a_batch_without_tokens_are_finite(device):
    q, k, _ = (x.to(device, WIDEST) for x in qkv(1, HEADS, 5, 8))
    sigma_q, sigma_k, alpha, beta = measure(
        q, k, torch.zeros(1, 5, dtype=torch.bool, device=device), PUBLISHED, impl="triton"
    )
    assert sigma_q == 1
    assert sigma_k == 1
    assert alpha.isfinite()
    assert beta.isfinite()


def test_operators_pass_opcheck(device):
    from kernels.lln import ops

    q, k, v = (x.to(device, torch.float32) for x in qkv(1, HEADS, 9, 8))
    mask, one = padding(1, 9, kind="scattered").to(device), torch.ones(1, device=device)
    weight = torch.rand(HEADS, 8, device=device)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.moments, (q, k, mask, [1], *PUBLISHED))
    for options in ((True, 0.5, 0.5, None, None), (True, 1.0, 0.0, weight, weight)):
        torch.library.opcheck(ops.forward, (q, k, v, mask, one, one, *options), test_utils=checks)
        out, context, log_mass = ops.forward(q, k, v, mask, one, one, *options)
        arguments = (out, q, k, v, mask, one, one, context, log_mass, *options)
        torch.library.opcheck(ops.backward, arguments, test_utils=checks)


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    module = attention.build("lln_diag", num_heads=HEADS, head_dim=8, max_length=64, impl="triton")
    inputs = [x.to(device, torch.float32).requires_grad_() for x in qkv(2, HEADS, 20, 8)]
    assert_compiles_whole(module, inputs)


def test_what_the_kernels_cannot_do_is_refused_in_one_line(device):
    with pytest.raises(ValueError, match=r"^attention\.impl=triton .+$"):
        attention.build("lln", num_heads=2, head_dim=8, max_length=8, causal=True, statistics="frozen", impl="triton")
    q, k, v = (x.to(device, torch.float32) for x in qkv(1, 1, 4, 256))
    one = torch.ones(1, device=device)
    with pytest.raises(ValueError, match=r"^attention\.impl=triton of lln takes head_dim <= 128, got 256.*$"):
        lln(q, k, v, alpha=one, beta=one, impl="triton")
    with pytest.raises(ValueError, match=r"^attention\.impl=triton of lln has no causal form.*$"):
        lln(q, k, v, alpha=one, beta=one, causal=True, impl="triton")
    with pytest.raises(ValueError, match=r"^attention\.impl=triton mixes by two numbers or by two tensors .+$"):
        lln(*(x[..., :8] for x in (q, k, v)), alpha=one, beta=one, mix=(0.5, torch.ones(1, 1, 1, 8)), impl="triton")


# --- compiled for an H100, in a process of its own: this one interprets


# Pairwise: the product of diags, dimensions, dtypes and masks is half an hour of compiling. float32 at D = 128 takes
# minutes alone.
GRID = [
    ["lln", {}, 8, "float16", True],
    ["lln", {}, 16, "float32", False],
    ["lln_diag", {"diag": "learnable_scale"}, 24, "bfloat16", False],
    ["lln_diag", {}, 128, "bfloat16", True],
]


@tiers([["lln", {}, 32, "bfloat16", False], ["lln_diag", {}, 64, "bfloat16", True]], GRID)
def test_kernels_compile_for_an_h100_and_fit_its_shared_memory(cases):
    # Two registers, in the summary that is fastest on the card.
    reports = assert_compiles(cases, {"partial_moments", "summarise", "queries"}, spills=8)
    assert not any(report["twofold"] for report in reports if report["dtype"] == "bfloat16")


def test_two_layouts_at_one_address_are_found():
    wide, narrow = 0x40000040 << 32, (0xC0000010 << 32) - 2**64  # swizzles over 128 and over 32 bytes
    one = f"or.b64  \t%rd2, %rd1, {wide}; add.s64 \t%rd3, %rd1, {wide + 2}; or.b64 %rd5, %rd4, {narrow};"
    assert twofold_addresses(one) == []
    assert twofold_addresses(f"{one} add.s64 \t%rd6, %rd1, {narrow + 32};") == ["%rd1"]


# --- on the GPU only


@gpu
@native_only
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_large_bf16_call_is_right_repeats_every_bit_and_can_be_captured(name, dim):
    module = attention.build(name, num_heads=2, head_dim=dim, max_length=4096, impl="triton").cuda()
    plain = attention.build(name, num_heads=2, head_dim=dim, max_length=4096, impl="reference").cuda()
    inputs = [x.cuda().requires_grad_() for x in qkv(16, 2, 4096, dim, dtype=torch.bfloat16)]
    cotangent = qkv(16, 2, 4096, dim, seed=5, dtype=torch.bfloat16)[0].cuda()

    def step(module, inputs=inputs, mask=None):
        out = module(*inputs, mask)
        return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]

    for mask in (None, padding(16, 4096).cuda()):
        wide = [x.detach().double().requires_grad_() for x in inputs]
        mine, again, exact = step(module, mask=mask), step(module, mask=mask), step(plain.double(), wide, mask)
        other = step(plain.float(), mask=mask)
        for name, a, b, p, e in zip(("out", "dq", "dk", "dv"), mine, again, other, exact, strict=True):
            assert torch.equal(a, b), f"{name} differs between two runs"
            assert_as_good_as(a, p, e, name)

    assert all(torch.equal(a, b) for a, b in zip(replayed(lambda: step(module)), step(module), strict=True))
