"""MRA's kernels refine the pairs that the reference refines, and compute its values and gradients on them."""

import pytest
import torch
from gradients import assert_compiles_whole
from guards import guarded_allocations, guarded_qkv
from inputs import padding, qkv
from oracles.mra import block_pairs
from oracles.mra import mra_attention as oracle
from replay import replayed
from sm90 import assert_compiles, tiers
from tolerance import assert_as_good_as, assert_exact
from torch import Tensor
from torch.nn.functional import pad

import attention
from kernels.mra import mra_attention, select
from kernels.mra.reference import attend_blocks, select_blocks

NATIVE = torch.cuda.is_available()
NAMES = ("out", "dq", "dk", "dv")
# Batch, heads, length, mask, head dimension, mode, block size, blocks a row, first blocks, diagonal blocks.
CASES = [
    (1, 2, 60, None, 8, "full", 16, 1, 0, 0),
    (2, 1, 70, "empty", 24, "full", 16, 2, 1, 1),
    (1, 1, 96, None, 16, "sparse", 16, 1, 0, 3),
    (1, 2, 65, "scattered", 32, "full", 32, 1, 0, 0),
    (1, 1, 1, None, 8, "full", 32, 8, 0, 0),
    pytest.param((2, 1, 33, "one", 16, "sparse", 16, 8, 2, 0), marks=pytest.mark.slow),
    pytest.param((1, 1, 130, "suffix", 64, "full", 64, 1, 0, 1), marks=pytest.mark.slow),
    pytest.param((1, 1, 100, "scattered", 128, "full", 32, 2, 0, 0), marks=pytest.mark.slow),
    pytest.param((1, 1, 600, "suffix", 16, "full", 16, 3, 1, 1), marks=pytest.mark.slow),
]
gpu = pytest.mark.gpu
native_only = pytest.mark.skipif(not NATIVE, reason="needs a GPU")
interpreted_only = pytest.mark.skipif(NATIVE, reason="float64 runs in the interpreter only")


def unpack(case: tuple) -> tuple[list[Tensor], Tensor | None, dict]:
    """Inputs, mask and options of a case."""
    batch, heads, length, kind, dim, *options = case
    names = ("mode", "block_size", "blocks_per_row", "first_blocks", "diagonal_blocks")
    mask = None if kind is None else padding(batch, length, kind=kind)
    return qkv(batch, heads, length, dim), mask, dict(zip(names, options, strict=True))


def selected(q: Tensor, k: Tensor, mask: Tensor | None, block_size: int, blocks_per_row: int, *priors: int) -> Tensor:
    """The pairs that the kernels refine, as `select_blocks` gives them."""
    options = dict(zip(("first_blocks", "diagonal_blocks"), priors, strict=True))
    return select(q, k, mask, block_size=block_size, blocks_per_row=blocks_per_row, **options, impl="triton")


def selections(q: Tensor, k: Tensor, mask: Tensor | None, block_size: int, blocks_per_row: int, *priors: int):
    """The same, as the forward pass leaves them: from the lists of query blocks and from those of key blocks."""
    from kernels.mra import ops
    from kernels.mra.triton_lists import select, transpose

    blocks = -(-q.shape[2] // block_size)
    budget = min(blocks_per_row * blocks, blocks**2)
    chosen, _ = select(q, k, k, mask, True, block_size, budget, *priors)
    real = torch.ones(1, q.shape[2]).bool() if mask is None else mask
    occupied = pad(real, (0, -q.shape[2] % block_size)).unflatten(1, (-1, block_size)).any(-1).sum(-1)
    number = occupied.square().clamp(max=budget).expand(len(q)).repeat_interleave(q.shape[1])[:, None]
    shape, listings = (*q.shape[:2], budget), []
    for (starts, listed), own in (((chosen.starts, chosen.listed), (blocks, 1)), (transpose(chosen), (1, blocks))):
        assert (starts[:, :1] == 0).all()
        assert torch.equal(starts[:, -1:], number.int()), "pairs without real tokens are not walked"
        pairs = ops.owners(starts, listed) * own[0] + listed.long() * own[1]
        if own[1] == 1:
            behind = torch.arange(1, budget, device=q.device) >= number
            assert (behind | (pairs.diff(dim=-1) > 0)).all(), "lists are in order"
        listings.append(ops.filled(pairs, number, blocks**2).view(shape))
    return listings


def evaluate(inputs: list[Tensor], call, dtype: torch.dtype, device: str | torch.device) -> list[Tensor]:
    """Output and gradients of q, k, v of `call` for the inputs converted to `dtype`."""
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    out = call(*leaves)
    cotangent = qkv(*out.shape, seed=7)[0].to(device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@interpreted_only
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_the_definition_in_float64(case):
    inputs, mask, options = unpack(case)
    choice = {key: value for key, value in options.items() if key != "mode"}
    pairs = block_pairs(*inputs[:2], mask, **choice)
    mine = evaluate(inputs, lambda *x: mra_attention(*x, mask, impl="triton", **options), torch.float64, "cpu")
    mode, block_size = options["mode"], options["block_size"]
    exact = evaluate(inputs, lambda *x: oracle(*x, mask, pairs, mode=mode, block_size=block_size), torch.float64, "cpu")
    assert mine[0].transpose(1, 2).is_contiguous()
    assert_exact(mine[0], exact[0], "out")
    # As one vector: with one visible token the gradients of q and k are zero but for rounding.
    assert_exact(*(torch.cat([g.flatten() for g in r[1:]]) for r in (mine, exact)), "gradient")
    if mask is not None:
        padded = ~mask[:, None, :, None].expand_as(inputs[0])
        assert all((x[padded] == 0).all() for x in mine)


@pytest.mark.parametrize(
    ("length", "blocks_per_row", "kind", "priors", "side"),
    [
        (150, 2, "suffix", (1, 3), 128),
        (150, 2, "suffix", (1, 3), 0),
        pytest.param(300, 2, "suffix", (1, 3), 0, marks=pytest.mark.slow),
        (64, 1, "scattered", (2, 0), 0),
        (20, 8, None, (0, 1), 128),
        (512, 2, None, (0, 0), 128),
        pytest.param(512, 2, None, (0, 0), 0, marks=pytest.mark.slow),
        (520, 1, "scattered", (0, 0), 0),
        pytest.param(1000, 3, "empty", (1, 1), 128, marks=pytest.mark.slow),
        pytest.param(2200, 5, None, (0, 0), 128, marks=pytest.mark.slow),
        pytest.param(8192, 3, None, (0, 0), 128, marks=pytest.mark.slow),
    ],
)
def test_selection_is_that_of_the_reference(length, blocks_per_row, kind, priors, side, device, monkeypatch):
    """side = 0 takes short sequences the way of long ones: tiles of part of a row, more candidates than one holds."""
    monkeypatch.setattr("kernels.mra.triton_select.PAIRS", side * side)
    if side == 0:
        monkeypatch.setattr("kernels.mra.triton_select.CHUNK", 32)
        monkeypatch.setattr("kernels.mra.triton_select.CANDIDATES", 16)
    block_size = 16
    q, k, _ = (x.to(device, torch.float32) for x in qkv(1 if kind is None else 2, 1, length, 8))
    mask = None if kind is None else padding(2, length, kind=kind).to(device)
    by_row, by_column = selections(q, k, mask, block_size, blocks_per_row, *priors)
    expected = select_blocks(
        q.double(), k.double(), mask, block_size=block_size, blocks_per_row=blocks_per_row,
        first_blocks=priors[0], diagonal_blocks=priors[1],
    )  # fmt: skip
    assert torch.equal(by_row, expected)
    assert torch.equal(by_column, expected)


@pytest.mark.slow
def test_selection_does_not_depend_on_where_the_better_pairs_stand(device, monkeypatch):
    """Where they share groups, bounds of samples are so loose that every guess of a lower one is wrong."""
    monkeypatch.setattr("kernels.mra.triton_select.PAIRS", 0)
    monkeypatch.setattr("kernels.mra.triton_select.CHUNK", 32)
    q, k, _ = (x.to(device, torch.float32) for x in qkv(1, 1, 1024, 8, seed=2))
    block = torch.arange(1024, device=device) // 16
    k[..., 0] = torch.where(block % 8 < 2, 0.0, -20.0)
    q[..., 0] = 1.0
    expected = select_blocks(
        q.double(), k.double(), None, block_size=16, blocks_per_row=2, first_blocks=0, diagonal_blocks=0
    )
    assert torch.equal(selected(q, k, None, 16, 2, 0, 0), expected)


@pytest.mark.parametrize("side", [0, 128])
def test_ties_go_to_the_lowest_index_after_priors(side, device, monkeypatch):
    monkeypatch.setattr("kernels.mra.triton_select.PAIRS", side * side)
    q, k, _ = (x.to(device, torch.float32) for x in qkv(1, 1, 64, 8, scale=0.0))
    assert selected(q, k, None, 16, 2, 0, 0).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert selected(q, k, None, 16, 2, 0, 1).flatten().tolist() == [0, 1, 2, 3, 4, 5, 10, 15]
    assert selected(q, k, None, 16, 2, 1, 0).flatten().tolist() == [0, 1, 2, 3, 4, 5, 8, 12]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scores_that_are_not_numbers_still_fill_the_budget(device):
    q, k, _ = (x.to(device, torch.float32) for x in qkv(1, 1, 64, 8))
    q[:, :, 20] = torch.nan
    k[:, :, 40] = torch.inf
    by_row, by_column = selections(q, k, None, 16, 2, 0, 0)
    assert torch.equal(by_row, by_column)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[gpu, native_only])],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(case, dtype, device):
    inputs, mask, options = unpack(case)
    inputs = [x.to(dtype) for x in inputs]
    mode, block_size = options["mode"], options["block_size"]
    priors = (options["first_blocks"], options["diagonal_blocks"])
    moved = None if mask is None else mask.to(device)
    q, k = (x.to(device) for x in inputs[:2])
    pairs = selected(q, k, moved, block_size, options["blocks_per_row"], *priors)

    def plain(*x: Tensor) -> Tensor:
        where = x[0].device
        out = attend_blocks(
            *x, None if mask is None else mask.to(where), pairs.to(where), mode=mode, block_size=block_size
        )
        out = out.to(x[0].dtype)
        return out if mask is None else out * mask.to(where)[:, None, :, None]

    exact = evaluate(inputs, plain, torch.float64, "cpu")
    other = evaluate(inputs, plain, dtype, device)
    mine = evaluate(inputs, lambda *x: mra_attention(*x, moved, impl="triton", **options), dtype, device)
    for name, actual, rival, value in zip(NAMES, mine, other, exact, strict=True):
        assert actual.dtype == rival.dtype
        assert_as_good_as(actual, rival, value, name)


@interpreted_only
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows of padding overflow, and are dropped
@pytest.mark.parametrize("scale", [pytest.param(1e-3, marks=pytest.mark.slow), 100.0])
def test_values_hold_at_every_scale(scale):
    """Very negative logits: a maximum that included padding would underflow every real weight."""
    q, k, v = qkv(1, 1, 60, 8, scale=scale)
    q, k = q + scale, k - scale
    mask = (torch.arange(60) % 3 > 0)[None]
    options = dict(block_size=16, blocks_per_row=2)
    pairs = block_pairs(q, k, mask, **options)
    mine = evaluate([q, k, v], lambda *x: mra_attention(*x, mask, impl="triton", **options), torch.float64, "cpu")
    exact = evaluate([q, k, v], lambda *x: oracle(*x, mask, pairs, mode="full", block_size=16), torch.float64, "cpu")
    assert_exact(mine[0], exact[0], "out")
    # As one vector: where one key takes all, the gradients of q and k are zero but for rounding.
    assert_exact(*(torch.cat([g.flatten() for g in r[1:]]) for r in (mine, exact)), "gradient")


@interpreted_only
def test_gradcheck():
    inputs, mask = qkv(1, 1, 20, 8, requires_grad=True), (torch.arange(20) % 5 > 0)[None]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mra_attention(q, k, v, mask, block_size=16, blocks_per_row=1, impl="triton")

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize(("length", "kind", "dim"), [(70, "scattered", 24)])
def test_kernels_stay_in_their_buffers_and_fill_them(length, kind, dim, device):
    mask = padding(1, length, kind=kind).to(device)
    leaves = guarded_qkv(1, 2, length, dim, mask, device)
    with guarded_allocations():
        out = mra_attention(*leaves, mask, block_size=16, blocks_per_row=2, impl="triton")
        cotangent = torch.ones_like(out).masked_fill(~mask[:, None, :, None], torch.nan)
        gradients = torch.autograd.grad(out, leaves, cotangent)
    assert all(x.isfinite().all() for x in (out, *gradients))


def test_operators_pass_opcheck(device):
    from kernels.mra import ops

    q, k, v = (x.to(device, torch.float32) for x in qkv(1, 1, 20, 8))
    mask = padding(1, 20, kind="scattered").to(device)
    checks = ("test_schema", "test_faketensor")
    arguments = (q, k, v, mask, True, 16, 2, 0, 0)
    torch.library.opcheck(ops.forward, arguments, test_utils=checks)
    out, *state = ops.forward(*arguments)
    torch.library.opcheck(ops.backward, (out, q, k, v, mask, out, *state, True, 16), test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mra", "mra_s"])
def test_compiles_without_a_graph_break(name, device):
    sizes = dict(num_heads=1, head_dim=8, max_length=64)
    module = attention.build(name, **sizes, block_size=16, blocks_per_row=1, impl="triton")
    inputs = [x.to(device, torch.float32).requires_grad_() for x in qkv(1, 1, 40, 8)]
    assert_compiles_whole(module, inputs)


def test_what_the_kernels_cannot_do_is_refused_in_one_line(device):
    q, k, v = (x.to(device, torch.float32) for x in qkv(1, 1, 4, 256))
    with pytest.raises(ValueError, match=r"^attention\.impl=triton of mra takes head_dim <= 128, got 256.*$"):
        mra_attention(q, k, v, impl="triton")


# --- compiled for an H100, in a process of its own: this one interprets

DEFAULT = [["mra", {}, 32, "bfloat16", False], ["mra_s", {}, 64, "bfloat16", True]]
GRID = [  # block sizes, paddings of D, dtypes, modes, priors and masks; with 4096 tokens the long ways of the selection
    ["mra", {"block_size": 16, "first_blocks": 1}, 32, "float32", True, 4096],
    ["mra_s", {"diagonal_blocks": 1}, 24, "float16", True, 256],
    ["mra", {"block_size": 64}, 128, "bfloat16", False, 4096],
    ["mra", {}, 64, "bfloat16", False, 65_536],
]


@tiers(DEFAULT, GRID)
def test_kernels_compile_for_an_h100_and_fit_its_shared_memory(cases):
    reports = assert_compiles(cases, {"rank", "finish", "attend", "queries", "keys"})
    for report in reports if cases is DEFAULT else ():
        assert report["local"] == 0, f"spills: {report}"
        if report["kernel"] == "rank_kernel":
            assert report["fused"] == 0, "keys round as finish_kernel's do"


# --- on the GPU only


@gpu
@native_only
@pytest.mark.parametrize("name", ["mra", "mra_s"])
def test_large_bf16_call_is_right_repeats_every_bit_and_can_be_captured(name):
    module = attention.build(name, num_heads=2, head_dim=32, max_length=4096, impl="triton").cuda()
    inputs = [x.cuda() for x in qkv(8, 2, 4096, 32, dtype=torch.bfloat16)]
    for mask in (None, padding(8, 4096).cuda()):
        pairs = selected(*inputs[:2], mask, 32, 8, 0, 0)
        wide = select_blocks(
            *(x.double() for x in inputs[:2]), mask, block_size=32, blocks_per_row=8, first_blocks=0, diagonal_blocks=0
        )
        heads = zip(pairs.flatten(0, 1).tolist(), wide.flatten(0, 1).tolist(), strict=True)
        apart = sum(len(set(a) ^ set(b)) for a, b in heads)
        assert apart <= 8, f"{apart} of {2 * pairs.numel()} pairs differ from those of float64"

        def plain(*x: Tensor, pairs=pairs, mask=mask) -> Tensor:
            out = attend_blocks(*x, mask, pairs[: len(x[0])], mode=module.mode, block_size=32).to(x[0].dtype)
            return out if mask is None else out * mask[:, None, :, None]

        mine, again = (evaluate(inputs, lambda *x, m=mask: module(*x, m), torch.bfloat16, "cuda") for _ in range(2))
        exact, other = (evaluate(inputs, plain, dtype, "cuda") for dtype in (torch.float64, torch.bfloat16))
        for title, a, b, rival, value in zip(NAMES, mine, again, other, exact, strict=True):
            assert torch.equal(a, b), f"{title} differs between two runs"
            assert_as_good_as(a, rival, value, title)

    leaves = [x.requires_grad_() for x in inputs]

    def step() -> list[Tensor]:
        out = module(*leaves)
        return [out, *torch.autograd.grad(out, leaves, leaves[0].detach())]

    assert all(torch.equal(a, b) for a, b in zip(replayed(step), step(), strict=True))
