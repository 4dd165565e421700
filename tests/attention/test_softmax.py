"""The exact baseline agrees with softmax attention written out densely."""

import pytest
import torch
from inputs import padding, qkv
from oracles.softmax import softmax_attention, softmax_weights
from tolerance import assert_exact

import attention


@pytest.mark.parametrize("kind", [None, "suffix", "scattered", "one", "empty"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_outputs_and_gradients_agree_with_the_definition(kind, causal, length):
    key_mask = None if kind is None else padding(3, length, kind=kind)
    module = attention.build("softmax", num_heads=2, head_dim=8, max_length=64, causal=causal)
    weight = qkv(3, 2, length, 8, seed=1)[0]
    results = []
    for function in (module, lambda q, k, v, mask: softmax_attention(q, k, v, mask, causal)):
        inputs = qkv(3, 2, length, 8, requires_grad=True)
        out = function(*inputs, key_mask)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for name, actual, expected in zip(["out", "dq", "dk", "dv"], *results, strict=True):
        assert_exact(actual, expected, name)


def test_weights_of_every_real_query_sum_to_one_and_the_rest_are_zero():
    q, k, _ = qkv(3, 2, 33, 8)
    key_mask = padding(3, 33, kind="empty")
    sums = softmax_weights(q, k, key_mask).sum(-1)
    assert_exact(sums, key_mask[:, None].expand(3, 2, 33).double())


def test_gradients_stay_finite_where_the_real_logits_are_far_below_those_of_the_padding():
    q, k, v = [x.requires_grad_() for x in qkv(1, 1, 8, 4, scale=100.0)]
    key_mask = torch.arange(8)[None] == (q @ k.transpose(-1, -2))[0, 0].sum(0).argmin()
    softmax_attention(q, k, v, key_mask).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


# Training steps of a model that is compiled for a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("length", "kind"), [(300, "suffix"), (512, "suffix"), (300, "scattered"), (300, "empty")])
def test_a_compiled_model_trains_and_evaluates_like_an_eager_one(length: int, kind: str):
    module = attention.build("softmax", num_heads=2, head_dim=32, max_length=length).cuda()
    compiled = torch.compile(module, dynamic=False)
    key_mask = padding(3, length, kind=kind).cuda()
    results = []
    for function in (module, compiled):
        q, k, v = (x.float().cuda().requires_grad_() for x in qkv(3, 2, length, 32))
        out = function(q, k, v, key_mask)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))])
        with torch.no_grad():
            results[-1].append(function(q, k, v, key_mask))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
