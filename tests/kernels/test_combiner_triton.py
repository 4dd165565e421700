"""Combiner's kernels compute what the reference computes: interpreted without a GPU, native with one."""

import pytest
import torch
from guards import guarded_allocations, guarded_qkv
from inputs import padding, qkv
from replay import replayed
from sm90 import assert_compiles, tiers
from tolerance import assert_as_good_as, assert_exact
from torch import Tensor

import attention
from kernels.combiner import combiner

NATIVE = torch.cuda.is_available()
HEADS = 2
OWN = {"include_own_span": True}
CAUSAL = {"causal": True}
ROWS = {"pattern": "axial"}
TREE = {"pattern": "logsparse"}
# Length, mask, head dimension, segment, further options: spans of every raggedness, every kind of mask.
FIXED = [
    (1, None, 8, 64, {}),
    (33, "one", 16, 20, {}),
    (50, "scattered", 24, 20, {}),
    (20, "suffix", 8, 16, OWN),
    (40, "empty", 8, 16, CAUSAL),
    pytest.param(100, "scattered", 24, 20, {}, marks=pytest.mark.slow),
    pytest.param(130, None, 32, 64, {}, marks=pytest.mark.slow),
    pytest.param(200, "scattered", 64, 100, CAUSAL, marks=pytest.mark.slow),
    pytest.param(70, "suffix", 128, 16, {}, marks=pytest.mark.slow),
]
AXIAL = [
    (3, None, 8, 4, ROWS),
    (10, "empty", 16, 4, ROWS),  # a ragged last row
    (20, "scattered", 8, 5, ROWS),
    pytest.param(32, None, 24, 8, ROWS, marks=pytest.mark.slow),
    pytest.param(12, "suffix", 8, 1, ROWS, marks=pytest.mark.slow),
    pytest.param(120, "scattered", 64, 100, ROWS, marks=pytest.mark.slow),
]
# Length, mask, head dimension, tokens of a tile, options: a tile is a subtree, the tiles are the leaves of another.
LOGSPARSE = [
    (1, None, 8, 4, TREE),
    (11, "scattered", 8, 4, TREE),
    (11, "suffix", 8, 4, TREE | CAUSAL),
    pytest.param(19, "empty", 24, 4, TREE, marks=pytest.mark.slow),
    pytest.param(30, "suffix", 16, 2, TREE, marks=pytest.mark.slow),
    pytest.param(150, None, 32, 64, TREE, marks=pytest.mark.slow),
    pytest.param(150, "scattered", 8, 64, TREE | CAUSAL, marks=pytest.mark.slow),
]
NAMES = ("out", "dq", "dk", "dv")
gpu = pytest.mark.gpu
native_only = pytest.mark.skipif(not NATIVE, reason="needs a GPU")
interpreted_only = pytest.mark.skipif(NATIVE, reason="float64 runs in the interpreter only")


def evaluate(
    inputs: list[Tensor], mask: Tensor | None, impl: str, dtype: torch.dtype, device, segment: int, options: dict
) -> list[Tensor]:
    """Output, then gradients of q, k and v, for the inputs converted to `dtype`."""
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    mask = None if mask is None else mask.to(device)
    out = combiner(*inputs, mask, segment_length=segment, impl=impl, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, qkv(*out.shape, seed=7)[0].to(device, dtype))]


def assert_is_the_reference(length, kind, dim, segment, options):
    batch, heads = (2, 1) if kind == "empty" else (1, 2)
    inputs, mask = qkv(batch, heads, length, dim), None if kind is None else padding(batch, length, kind=kind)
    mine, theirs = (
        evaluate(inputs, mask, impl, torch.float64, "cpu", segment, options) for impl in ("triton", "reference")
    )
    assert mine[0].transpose(1, 2).is_contiguous()
    assert_exact(mine[0], theirs[0], "out")
    # As one vector: with one token the gradients of q and k are zero but for rounding.
    assert_exact(*(torch.cat([g.flatten() for g in r[1:]]) for r in (mine, theirs)), "gradient of q, k, v")
    if mask is not None:
        padded = ~mask[:, None, :, None].expand_as(inputs[0])
        assert all((x[padded] == 0).all() for x in mine)


@interpreted_only
@pytest.mark.parametrize(("length", "kind", "dim", "segment", "options"), FIXED + AXIAL)
def test_output_and_gradients_are_those_of_the_reference_in_float64(length, kind, dim, segment, options):
    assert_is_the_reference(length, kind, dim, segment, options)


@interpreted_only
@pytest.mark.parametrize(("length", "kind", "dim", "tile", "options"), LOGSPARSE)
def test_logsparse_is_that_of_the_reference_in_float64(length, kind, dim, tile, options, monkeypatch):
    monkeypatch.setattr("kernels.combiner.triton_logsparse.TILE", 2 * tile)  # float64 takes half
    assert_is_the_reference(length, kind, dim, 64, options)


@interpreted_only
@pytest.mark.parametrize("options", [CAUSAL, pytest.param({}, marks=pytest.mark.slow)], ids=["causal", "bidirectional"])
def test_summaries_may_take_several_tiles(options, monkeypatch):
    monkeypatch.setattr("kernels.combiner.triton.MAX_BLOCK_G", 16)
    assert_is_the_reference(17, "scattered", 8, 1, options)  # 17 summaries


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[gpu, native_only])],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize(
    ("length", "kind", "dim", "segment", "options"),
    [
        (70, "scattered", 24, 32, {}),
        (30, "scattered", 8, 6, ROWS),
        (70, "scattered", 8, 64, TREE),
        # δ = do·out rounds where a query sees little but itself: causal sequences need some length to hide that.
        pytest.param(100, "suffix", 16, 20, CAUSAL, marks=pytest.mark.slow),
        pytest.param(200, None, 32, 64, {}, marks=pytest.mark.slow),
        pytest.param(100, "suffix", 24, 10, ROWS, marks=pytest.mark.slow),
        pytest.param(150, "suffix", 24, 64, TREE | CAUSAL, marks=pytest.mark.slow),
    ],
)
def test_error_is_at_most_twice_that_of_plain_pytorch(length, kind, dim, segment, options, dtype, device):
    inputs = [x.to(dtype) for x in qkv(1, HEADS, length, dim)]
    mask = None if kind is None else padding(1, length, kind=kind)
    exact = evaluate(inputs, mask, "reference", torch.float64, "cpu", segment, options)
    plain = evaluate(inputs, mask, "reference", dtype, device, segment, options)
    mine = evaluate(inputs, mask, "triton", dtype, device, segment, options)
    for name, actual, other, value in zip(NAMES, mine, plain, exact, strict=True):
        assert actual.dtype == other.dtype
        assert_as_good_as(actual, other, value, name)


@interpreted_only
def test_gradcheck():
    inputs, mask = qkv(1, 1, 11, 8, requires_grad=True), torch.ones(1, 11, dtype=torch.bool)
    mask[:, 2:6] = False

    def call(*x: Tensor) -> Tensor:
        return combiner(*x, mask, segment_length=4, impl="triton")

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("options", [{}, TREE], ids=["fixed", "logsparse"])
def test_ties_of_a_maximum_share_its_gradient(options, device, monkeypatch):
    monkeypatch.setattr("kernels.combiner.triton_logsparse.TILE", 32)
    inputs = [x.to(device, torch.float32) for x in qkv(1, 1, 24, 8)]
    inputs = [x.round() for x in inputs]  # whole numbers: nearly every maximum is held by several rows
    plain, mine = (evaluate(inputs, None, impl, torch.float32, device, 8, options) for impl in ("reference", "triton"))
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("length", "kind", "dim", "segment", "options"),
    [
        (35, "scattered", 24, 16, {}),
        (10, "scattered", 8, 4, ROWS),
        (20, "scattered", 8, 64, TREE),
        pytest.param(30, None, 16, 12, CAUSAL, marks=pytest.mark.slow),
        pytest.param(18, None, 24, 4, ROWS, marks=pytest.mark.slow),
    ],
)
def test_kernels_stay_in_their_buffers_and_fill_them(length, kind, dim, segment, options, device, monkeypatch):
    monkeypatch.setattr("kernels.combiner.triton_logsparse.TILE", 32)
    mask = None if kind is None else padding(1, length, kind=kind).to(device)
    leaves = guarded_qkv(1, HEADS, length, dim, mask, device)
    with guarded_allocations():
        out = combiner(*leaves, mask, segment_length=segment, impl="triton", **options)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *gradients))


def test_a_second_backward_pass_of_a_call_gives_the_same_bits(device):
    """Axial's gradients replace, in place, what they are made of: none of that may belong to the forward pass."""
    leaves = [x.to(device).requires_grad_() for x in qkv(1, 1, 7, 8, dtype=torch.float32)]
    loss = combiner(*leaves, segment_length=4, impl="triton", **ROWS).square().sum()
    once, again = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize(
    "pattern",
    ["fixed", pytest.param("logsparse", marks=pytest.mark.slow), pytest.param("axial", marks=pytest.mark.slow)],
)
def test_operators_pass_opcheck(pattern, device):
    from kernels.combiner import ops

    q, k, v = (x.to(device, torch.float32) for x in qkv(1, 1, 9, 8))
    mask, options = padding(1, 9, kind="scattered").to(device), (pattern, 8, False, False)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.forward, (q, k, v, mask, *options), test_utils=checks)
    state = ops.forward(q, k, v, mask, *options)
    torch.library.opcheck(ops.backward, (state[0], q, k, v, mask, state, *options), test_utils=checks)


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    module = attention.build("combiner", num_heads=HEADS, head_dim=8, max_length=64, segment_length=8, impl="triton")
    inputs = [x.to(device, torch.float32).requires_grad_() for x in qkv(2, HEADS, 20, 8)]
    compiled = torch.compile(module, fullgraph=True)
    for mask in (None, padding(2, 20).to(device)):
        expected, actual = module(*inputs, mask), compiled(*inputs, mask)
        torch.testing.assert_close(actual, expected)
        gradients = (torch.autograd.grad(x.square().sum(), inputs) for x in (actual, expected))
        for mine, other in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "axial_vertical"},
        {"pattern": "axial_horizontal"},
        {"segment_length": 129},
        {"pattern": "axial", "causal": True},
        {"pattern": "axial", "include_own_span": True},
    ],
)
def test_variants_without_kernels_are_refused_in_one_line_and_run_the_reference_otherwise(options):
    sizes = dict(num_heads=2, head_dim=8, max_length=8)
    with pytest.raises(ValueError, match=r"^attention\.impl=triton of combiner .+; use attention\.impl=reference$"):
        attention.build("combiner", impl="triton", **sizes, **options)
    assert attention.build("combiner", **sizes, **options).implementation(torch.device("cuda")) == "reference"
    assert attention.build("combiner", **sizes).implementation(torch.device("cuda")) == "triton"


# --- compiled for an H100, in a process of its own: this one interprets


# Every pattern with every dtype; dimensions and masks rotate, so that every dtype meets all of them, and the largest
# segment has the largest tiles.
DIMS, DTYPES = (8, 24, 32, 64, 128), ("bfloat16", "float16", "float32")
PATTERNS = (
    {"segment_length": 128},
    {"segment_length": 64},
    {"segment_length": 64, **CAUSAL},
    {"segment_length": 16},
    {"segment_length": 16, **ROWS},
    TREE,
    TREE | CAUSAL,
)
GRID = [
    ["combiner", options, DIMS[(row + 2 * column) % len(DIMS)], dtype, (row + column) % 2 == 1]
    for row, options in enumerate(PATTERNS)
    for column, dtype in enumerate(DTYPES)
]
KERNELS = {
    "fixed": {"summarise", "attend", "spans_backward", "summaries_backward"},
    "axial": {"rows", "columns", "rows_backward", "columns_queries"},
    "logsparse": {"leaves", "shares", "queries", "tokens_backward"},
}


@tiers([["combiner", {}, 32, "bfloat16", False], ["combiner", {}, 64, "bfloat16", True]], GRID)
def test_kernels_compile_for_an_h100_and_fit_its_shared_memory(cases):
    kernels = (KERNELS[options.get("pattern", "fixed")] for _, options, *_ in cases)
    assert_compiles(cases, set().union(*kernels), spills=0)


# --- on the GPU only


@gpu
@native_only
@pytest.mark.parametrize(
    ("segment", "options"),
    [(64, {}), (128, {}), (64, CAUSAL), (64, ROWS), (16, ROWS), (64, TREE), (64, TREE | CAUSAL)],
)
def test_large_bf16_call_is_right_repeats_every_bit_and_can_be_captured(segment, options):
    sizes = dict(num_heads=2, head_dim=32, max_length=4096, segment_length=segment, **options)
    module = attention.build("combiner", impl="triton", **sizes)
    plain = attention.build("combiner", impl="reference", **sizes)
    inputs = [x.cuda().requires_grad_() for x in qkv(8, 2, 4096, 32, dtype=torch.bfloat16)]
    cotangent = qkv(8, 2, 4096, 32, seed=5, dtype=torch.bfloat16)[0].cuda()

    def step(module, inputs=inputs, mask=None):
        out = module(*inputs, mask)
        return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]

    for mask in (None, padding(8, 4096, kind="scattered").cuda()):
        wide = [x.detach().double().requires_grad_() for x in inputs]
        mine, again, exact = step(module, mask=mask), step(module, mask=mask), step(plain, wide, mask)
        other = step(plain, mask=mask)
        for name, a, b, p, e in zip(NAMES, mine, again, other, exact, strict=True):
            assert torch.equal(a, b), f"{name} differs between two runs"
            assert_as_good_as(a, p, e, name)

    assert all(torch.equal(a, b) for a, b in zip(replayed(lambda: step(module)), step(module), strict=True))
