"""Attention without padding is masked attention: with a stand-in for flash attention on a CPU, with it on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import padding, qkv
from oracles.softmax import softmax_attention
from segments import backward, forward
from tolerance import assert_as_good_as, assert_exact
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attention
from kernels.softmax import ops, packed_attention, refusal

NATIVE = torch.cuda.is_available()
NAMES = ("out", "dq", "dk", "dv")
on_cpu = pytest.mark.skipif(NATIVE, reason="float64 runs in the interpreter only")


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not NATIVE, reason="needs a GPU")(test))


def evaluate(function, inputs: list[Tensor], mask: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output, then gradients of q, k, v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "flash_forward", forward)
    monkeypatch.setattr(ops, "flash_backward", backward)


def agrees(inputs: list[Tensor], mask: Tensor) -> None:
    cotangent = qkv(*inputs[0].shape, seed=5)[0]
    inputs = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]  # padding may hold anything
    mine = evaluate(ops.packed_attention, inputs, mask, cotangent)
    clean = [x.nan_to_num(0.0) for x in inputs]
    for name, actual, expected in zip(NAMES, mine, evaluate(softmax_attention, clean, mask, cotangent), strict=True):
        assert_exact(actual, expected, name)
        assert (actual.masked_select(~mask[:, None, :, None]) == 0).all(), f"{name} of padding is not zero"
        assert actual.transpose(1, 2).is_contiguous()


@on_cpu
@pytest.mark.parametrize(
    ("kind", "length", "dim"), [("suffix", 1, 8), ("one", 33, 8), ("scattered", 70, 24), ("empty", 65, 16)]
)
def test_output_and_gradients_are_those_of_masked_attention(kind, length, dim, interpreted):
    agrees(qkv(2, 2, length, dim), padding(2, length, kind=kind))


@on_cpu
@settings(max_examples=6, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_mask_will_do(data):
    length = data.draw(st.integers(1, 70))
    rows = st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=3)
    mask = torch.tensor(data.draw(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "flash_forward", forward)
        patch.setattr(ops, "flash_backward", backward)
        agrees(qkv(len(mask), 1, length, 8), mask)


@on_cpu
def test_heads_of_a_fused_projection_and_an_expanded_gradient_need_no_copy(interpreted):
    fused, mask = qkv(2, 33, 3, 16)[0], padding(2, 33, kind="scattered")  # (B, N, 3, H · D)
    inputs = [x.unflatten(-1, (2, 8)).transpose(1, 2) for x in fused.unbind(2)]
    cotangent = torch.ones((), dtype=torch.float64).expand(2, 2, 33, 8)
    mine = evaluate(ops.packed_attention, inputs, mask.T.contiguous().T, cotangent)
    for name, actual, expected in zip(NAMES, mine, evaluate(softmax_attention, inputs, mask, cotangent), strict=True):
        assert_exact(actual, expected, name)


@on_cpu
def test_operators_pass_opcheck(interpreted):
    checks = ("test_schema", "test_faketensor")
    inputs, mask = qkv(2, 1, 9, 8), padding(2, 9)
    ends, starts = ops.segments(mask)
    torch.library.opcheck(ops.segments, (mask,), test_utils=checks)
    torch.library.opcheck(ops.forward, (*inputs, mask, ends, starts), test_utils=checks)
    saved = ops.forward(*inputs, mask, ends, starts)
    torch.library.opcheck(ops.backward, (*saved, mask, ends, starts), test_utils=checks)


def test_what_it_does_not_take_is_refused_in_one_line():
    q, k, v = qkv(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"^attention without padding needs a CUDA device, got cpu$"):
        packed_attention(q, k, v, padding(1, 4))


# --- natively


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    visible = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=visible).masked_fill(~mask[:, None, :, None], 0.0)


def large(kind: str, dtype: torch.dtype, dim: int = 32) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v, the mask, the gradient of the output, while memory that is free holds NaN."""
    mask = padding(8, 1000, kind=kind).cuda()
    *inputs, cotangent = [x.cuda() for x in (*qkv(8, 2, 1000, dim, dtype=dtype), qkv(8, 2, 1000, dim, seed=5)[0])]
    torch.full((2**26,), torch.nan, device="cuda")
    return inputs, mask, cotangent.to(dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "dim"), [("suffix", 32), ("scattered", 64), ("one", 32), ("empty", 40)])
def test_error_is_at_most_twice_that_of_masked_sdpa(kind, dim, dtype):
    inputs, mask, cotangent = large(kind, dtype, dim)
    exact = evaluate(softmax_attention_on_gpu, [x.double() for x in inputs], mask, cotangent.double())
    plain = evaluate(masked_sdpa, inputs, mask, cotangent)
    poisoned = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    for name, a, p, e in zip(NAMES, evaluate(packed_attention, poisoned, mask, cotangent), plain, exact, strict=True):
        assert_as_good_as(a, p, e, name)
        assert (a.masked_select(~mask[:, None, :, None]) == 0).all()


def softmax_attention_on_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return masked_sdpa(q, k, v, mask)  # in float64: PyTorch's own mathematics


@on_gpu
def test_a_compiled_call_has_no_break_and_follows_its_mask():
    compiled = torch.compile(packed_attention, fullgraph=True, dynamic=False)
    for kind in ("suffix", "scattered", "empty"):
        inputs, mask, cotangent = large(kind, torch.bfloat16)
        mine, eager = (evaluate(f, inputs, mask, cotangent) for f in (compiled, packed_attention))
        assert torch.equal(mine[0], eager[0]), kind
        for name, a, e in zip(NAMES, mine, eager, strict=True):  # those of q are sums in any order
            torch.testing.assert_close(a, e, rtol=2e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@on_gpu
def test_a_captured_call_follows_its_mask_and_repeats_every_bit_where_asked():
    inputs, mask, cotangent = large("suffix", torch.bfloat16)
    held, stream = mask.clone(), torch.cuda.Stream()
    torch.use_deterministic_algorithms(True)
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            evaluate(packed_attention, inputs, held, cotangent)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            made = evaluate(packed_attention, inputs, held, cotangent)
        for other in (padding(8, 1000, kind="scattered", seed=3).cuda(), torch.zeros_like(mask), mask):
            held.copy_(other)
            graph.replay()
            for name, a, e in zip(NAMES, made, evaluate(packed_attention, inputs, other, cotangent), strict=True):
                assert torch.equal(a, e), name
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpu
def test_softmax_takes_it_where_there_is_a_mask_in_sixteen_bits():
    inputs, mask, _ = large("suffix", torch.bfloat16)
    sizes = dict(num_heads=2, head_dim=32, max_length=1000)
    assert torch.equal(attention.build("softmax", **sizes)(*inputs, mask), packed_attention(*inputs, mask))
    wide = [x.float() for x in inputs]
    assert refusal(wide[0]) == "takes bfloat16 and float16, got torch.float32"
    torch.testing.assert_close(attention.build("softmax", **sizes)(*wide, mask), masked_sdpa(*wide, mask))
    causal = attention.build("softmax", **sizes, causal=True)
    assert causal(*inputs, mask).isfinite().all()
