"""The classic baselines agree with their definitions, and with softmax where they should."""

from collections.abc import Callable

import pytest
import torch
from inputs import padding, qkv
from oracles import baselines
from oracles.softmax import softmax_attention
from tolerance import assert_exact, relative_error
from torch import Tensor

import attention
from attention.base import Attention
from attention.performer import orthogonal_gaussian

SIZES = {"num_heads": 2, "head_dim": 8, "max_length": 200}


def build(name: str, **options) -> Attention:
    torch.manual_seed(0)
    return attention.build(name, **{**SIZES, **options}).double()


Oracle = Callable[[Attention, list[Tensor], Tensor | None], Tensor]
CASES: dict[str, tuple[str, dict, Oracle]] = {
    "linear": ("linear", {}, lambda _, x, mask: baselines.linear(*x, mask)),
    "linear, causal": ("linear", {"causal": True}, lambda _, x, mask: baselines.linear(*x, mask, causal=True)),
    "performer": (
        "performer",
        {"num_features": 20},  # two whole groups of orthogonal directions and a part of a third
        lambda module, x, mask: baselines.performer(*x, module.projection, mask),
    ),
    "performer, causal": (
        "performer",
        {"num_features": 16, "causal": True},
        lambda module, x, mask: baselines.performer(*x, module.projection, mask, causal=True),
    ),
    "linformer": (
        "linformer",
        {"projected_length": 16},
        lambda module, x, mask: baselines.linformer(*x, module.projection, mask),
    ),
    "linformer, one for all heads": (
        "linformer",
        {"projected_length": 16, "per_head": False},
        lambda module, x, mask: baselines.linformer(*x, module.projection.expand(x[0].shape[1], -1, -1), mask),
    ),
    "nystromformer": (
        "nystromformer",
        {"num_landmarks": 8},
        lambda _, x, mask: baselines.nystromformer(*x, 8, 6, mask),
    ),
    "nystromformer, 64": (
        "nystromformer",
        {"pinv_iterations": 3},
        lambda _, x, mask: baselines.nystromformer(*x, 64, 3, mask),
    ),
    "local": ("local", {"block_size": 16}, lambda _, x, mask: baselines.local(*x, 16, mask)),
    "local, causal": (
        "local",
        {"block_size": 33, "causal": True},
        lambda _, x, mask: baselines.local(*x, 33, mask, causal=True),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2, 31, 33, 64, 100, 130])
def test_outputs_and_all_gradients_agree_with_the_definition(case: str, length: int):
    name, options, oracle = CASES[case]
    module = build(name, **options)
    cotangent = qkv(3, 2, length, 8, seed=1)[0]
    kinds = (None, "suffix", "scattered", "one", "empty") if length in (2, 33) else (None, "empty", "scattered")
    for kind in kinds:
        mask = None if kind is None else padding(3, length, kind=kind)
        outputs, gradients = [], []
        for function in (module, lambda *x: oracle(module, list(x[:3]), x[3])):
            inputs = qkv(3, 2, length, 8, requires_grad=True)
            out = function(*inputs, mask)
            leaves = [*inputs, *module.parameters()]
            found = torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True, materialize_grads=True)
            outputs.append(out)
            # With one visible key the gradients of q and k are zero up to rounding: judged by the size of all three.
            gradients.append([torch.stack(found[:3]), *found[3:]])
        assert_exact(*outputs, f"output, mask {kind}")
        for mine, exact in zip(*gradients, strict=True):
            assert_exact(mine, exact, f"gradient, mask {kind}")


# ---------------------------------------------------------------------------------------- reductions to softmax


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [None, "scattered"])
def test_local_with_one_block_is_softmax(causal: bool, kind: str | None):
    inputs, mask = qkv(2, 2, 50, 8), None if kind is None else padding(2, 50, kind=kind)
    for block_size in (50, 64):
        out = build("local", block_size=block_size, causal=causal)(*inputs, mask)
        assert_exact(out, softmax_attention(*inputs, mask, causal))


def test_linformer_with_the_identity_as_projection_is_softmax():
    module, inputs = build("linformer", projected_length=50), qkv(2, 2, 50, 8)
    module.projection.data = torch.eye(50, 200, dtype=torch.float64).repeat(2, 1, 1)
    assert_exact(module(*inputs), softmax_attention(*inputs))


@pytest.mark.parametrize("kind", [None, "suffix", "scattered"])
def test_nystromformer_with_a_landmark_a_token_is_softmax_once_the_inverse_has_converged(kind: str | None):
    inputs, mask = qkv(2, 2, 24, 8), None if kind is None else padding(2, 24, kind=kind)
    exact = softmax_attention(*inputs, mask)
    errors = [relative_error(build("nystromformer", pinv_iterations=n)(*inputs, mask), exact) for n in (6, 12, 40)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-8


def test_performer_approaches_softmax_as_the_features_grow():
    inputs = qkv(2, 2, 64, 8, scale=0.5)  # the variance of a feature grows as exp(‖q + k‖²)
    exact = softmax_attention(*inputs)
    errors = [relative_error(build("performer", num_features=f)(*inputs), exact) for f in (64, 1024, 16384)]
    # The error of a mean of F independent terms falls as 1 / √F: by 4 a step; 2.5 leaves room for chance.
    assert errors[0] > 2.5 * errors[1] > 2.5**2 * errors[2]
    assert errors[2] < 0.05


# ---------------------------------------------------------------------------------------- what each is known for


def test_none_passes_the_values_through():
    (q, k, v), mask = qkv(2, 2, 33, 8), padding(2, 33, kind="scattered")
    assert torch.equal(build("none")(q, k, v), v)
    assert torch.equal(build("none")(q, k, v, mask), v * mask[:, None, :, None])


@pytest.mark.parametrize("name", ["softmax", "local", "linear", "performer"])
@pytest.mark.parametrize("causal", [False, True])
def test_equal_values_come_out_unchanged(name: str, causal: bool):
    q, k, _ = qkv(2, 2, 100, 8)
    v = torch.full_like(q, 3.0)
    tolerance = 1e-6 if name == "linear" else 1e-12  # linear's published ε
    torch.testing.assert_close(build(name, causal=causal)(q, k, v), v, rtol=tolerance, atol=0.0)


def test_nystromformer_takes_the_published_segments_and_padding_changes_nothing():
    module = build("nystromformer", num_landmarks=8)
    segments = module.segments(torch.ones(1, 40, dtype=torch.bool))
    assert torch.equal(segments[0], torch.eye(8, dtype=torch.bool).repeat_interleave(5, dim=1))

    inputs, mask = qkv(1, 2, 40, 8), padding(1, 40, kind="scattered")
    real = [x[:, :, mask[0]] for x in inputs]
    assert_exact(module(*inputs, mask)[:, :, mask[0]], module(*real))


def test_performer_directions_are_orthogonal_in_groups_and_as_long_as_gaussian_vectors():
    torch.manual_seed(0)
    directions = orthogonal_gaussian(4 * 32 + 5, 32).double()
    assert directions.shape == (133, 32)
    for group in directions.split(32):
        gram = group @ group.T
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-4
    lengths = orthogonal_gaussian(4096, 32).square().sum(1)  # χ² with 32 degrees: mean 32, variance 64
    assert abs(lengths.mean() - 32) < 4 * (64 / 4096) ** 0.5
    assert abs(lengths.var() / 64 - 1) < 0.15


def test_performer_is_stable_in_single_precision_where_every_plain_feature_underflows():
    quiet, loud = qkv(1, 2, 64, 8), qkv(1, 2, 64, 8, scale=40.0)
    assert torch.exp(-(loud[1].float() / 8**0.25).square().sum(-1) / 2).max() == 0
    inputs = [torch.cat(pair) for pair in zip(quiet, loud, strict=True)]  # a quiet batch mate must not matter
    module = build("performer")
    single = module.float()(*(x.float() for x in inputs))
    assert relative_error(single[1], module.double()(*inputs)[1]) < 1e-3


@pytest.mark.parametrize("name", ["linear", "performer"])
def test_the_future_never_changes_the_past_by_a_single_bit(name: str):
    module, inputs = build(name, causal=True), qkv(2, 2, 130, 8)
    future = [torch.cat([x[:, :, :70], 100 * x[:, :, 70:]], dim=2) for x in inputs]
    assert torch.equal(module(*future)[:, :, :70], module(*inputs)[:, :, :70])


@pytest.mark.parametrize("name", ["linformer", "nystromformer"])
def test_methods_that_mix_all_positions_refuse_to_be_causal(name: str):
    with pytest.raises(ValueError, match=rf"^attention\.causal=True is impossible for {name}: .+$"):
        build(name, causal=True)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("local", "block_size"),
        ("performer", "num_features"),
        ("linformer", "projected_length"),
        ("nystromformer", "num_landmarks"),
        ("nystromformer", "pinv_iterations"),
    ],
)
@pytest.mark.parametrize("value", [0, -3, 2.5, True, None])
def test_options_must_be_positive_integers(name: str, key: str, value: object):
    with pytest.raises(ValueError, match=rf"^attention\.{key}={value!r} must be a positive integer$"):
        build(name, **{key: value})


def test_linformers_projection_starts_as_gaussian_of_deviation_two_hundredths():
    projection = build("linformer").projection  # 102,400 numbers
    assert projection.shape == (2, 256, 200)
    assert float(projection.detach().std()) == pytest.approx(0.02, rel=0.02)


def test_one_projection_a_head_or_for_all_is_true_or_false():
    with pytest.raises(ValueError, match=r"^attention\.per_head='no' must be true or false$"):
        build("linformer", per_head="no")


def test_the_defaults_are_the_sizes_of_the_mra_repository():
    assert attention.options("performer")["num_features"] == 256
    assert attention.options("linformer")["projected_length"] == 256
    assert attention.options("nystromformer")["num_landmarks"] == 64
    assert attention.options("local")["block_size"] == 64
    assert attention.options("linear") == {}
