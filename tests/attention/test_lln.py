"""The LLN module: its options, its parameters, and whose statistics its scales rest on."""

import pytest
import torch
from gradients import assert_same_gradients
from inputs import padding, qkv
from oracles import lln as oracle
from tolerance import assert_exact
from torch import Tensor, distributed

import attention
from attention.lln import LLN
from kernels.lln import DIAGS
from kernels.lln.moments import PUBLISHED, moment_constants

HEADS, DIM, LENGTH = 2, 8, 33
UNIT = torch.tensor([((1 - PUBLISHED[1]) / (2 * PUBLISHED[0])) ** 0.5], dtype=torch.float64)
"""α = β at σ = 1, what a module that has seen no training call stores."""


def build(name: str = "lln", **options) -> LLN:
    module = attention.build(name, num_heads=HEADS, head_dim=DIM, max_length=128, **options).double()
    assert isinstance(module, LLN)
    return module


def mix_of(module: LLN) -> tuple[Tensor, Tensor] | None:
    """The weights of both branches as the paper defines each mode, (H, D) each."""
    half = torch.full((HEADS, DIM), 0.5).double()
    r, p = (half if x is None else x[0, :, 0] for x in (module.r, module.p))
    return {
        "none": None,
        "average": (half, half),
        "learnable_scale": (r, p),
        "learnable_ratio": (r, 1 - r),
    }[module.diag]


@pytest.mark.parametrize("constants", ["published", "head_dim"])
@pytest.mark.parametrize("diag", DIAGS)
def test_module_and_parameter_gradients_are_those_of_the_definition(diag, constants):
    module = build(diag=diag, constants=constants)
    assert {name for name, _ in module.named_parameters()} == {
        "none": set(), "average": set(), "learnable_scale": {"r", "p"}, "learnable_ratio": {"r"}
    }[diag]  # fmt: skip
    for parameter in module.parameters():
        assert parameter.shape == (1, HEADS, 1, DIM)
        assert (parameter == 0.5).all()
        torch.nn.init.normal_(parameter)
    q, k, v = qkv(3, HEADS, LENGTH, DIM, requires_grad=True)
    mask = padding(3, LENGTH, kind="empty")

    out = module(q, k, v, mask)
    scales = oracle.scales(q.detach(), k.detach(), mask, *moment_constants(constants, DIM))
    expected = oracle.lln(q, k, v, mask, *scales, mix_of(module))

    assert_exact(out.detach(), expected.detach())
    direction = qkv(3, HEADS, LENGTH, DIM, seed=7)[0]
    leaves = {"q": q, "k": k, "v": v, **dict(module.named_parameters())}
    assert_same_gradients((out * direction).sum(), (expected * direction).sum(), leaves)


def test_lln_diag_is_lln_with_the_average():
    q, k, v = qkv(2, HEADS, LENGTH, DIM)
    assert torch.equal(build("lln_diag")(q, k, v), build(diag="average")(q, k, v))
    assert build("lln").diag == "none"


# --- statistics


def stored(module: LLN) -> tuple[float, float, int]:
    return float(module.moments.sigma_query), float(module.moments.sigma_key), int(module.moments.calls)


def test_batch_statistics_follow_the_call_in_training_and_evaluation_and_store_nothing():
    q, k, v = qkv(2, HEADS, LENGTH, DIM)
    q[1], k[1] = 3 * q[1], 3 * k[1]
    module = build()
    both = module(q, k, v)
    assert torch.equal(module.eval()(q, k, v), both)
    assert not torch.allclose(both[:1], module(q[:1], k[:1], v[:1]))  # depends on its batch mate, by definition
    assert stored(module) == (1, 1, 0)


@pytest.mark.parametrize("statistics", ["running", "frozen"])
def test_stored_statistics_make_evaluation_independent_of_batch_mates(statistics):
    q, k, v = qkv(2, HEADS, LENGTH, DIM)
    q[1], k[1] = 3 * q[1], 3 * k[1]
    module = build(statistics=statistics).eval()
    out = module(q, k, v)  # a fresh module: σ = 1
    assert_exact(out[:1], module(q[:1], k[:1], v[:1]))
    assert_exact(out, oracle.lln(q, k, v, torch.ones(2, LENGTH, dtype=torch.bool), UNIT, UNIT))
    assert stored(module) == (1, 1, 0)


def test_running_statistics_train_as_batch_and_average_their_calls():
    calls = [qkv(2, HEADS, LENGTH, DIM, seed=seed, scale=1 + seed) for seed in range(3)]
    mask = padding(2, LENGTH, kind="scattered")
    running, batch = build(statistics="running"), build()
    for q, k, v in calls:
        assert torch.equal(running(q, k, v, mask), batch(q, k, v, mask))
    tokens = mask.nonzero(as_tuple=True)
    sigmas = torch.stack([torch.stack([x.transpose(1, 2)[tokens].std() for x in call[:2]]) for call in calls])
    assert stored(running) == pytest.approx((*sigmas.mean(0).tolist(), 3), rel=1e-6)
    running.moments.calls += 10_000
    running(*(10 * x for x in calls[0]), mask)  # a late call moves the average by one hundredth
    late = sigmas.mean(0) + 0.01 * (10 * sigmas[0] - sigmas.mean(0))
    assert stored(running)[:2] == pytest.approx(late.tolist(), rel=1e-6)


@pytest.mark.parametrize("statistics", ["running", "frozen"])
def test_what_is_stored_is_the_mean_over_the_ranks(statistics, monkeypatch: pytest.MonkeyPatch):
    q, k, v = qkv(2, HEADS, LENGTH, DIM)
    alone, one_of_two = build(statistics=statistics), build(statistics=statistics)
    alone(q, k, v)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda half: half.mul_(4))  # the other rank's σ are thrice as large
    one_of_two(q, k, v)
    for name in ("sigma_query", "sigma_key"):
        assert_exact(getattr(one_of_two.moments, name), 2 * getattr(alone.moments, name))


def test_frozen_statistics_are_those_of_the_first_training_call_used_from_the_second_on():
    q, k, v = qkv(2, HEADS, LENGTH, DIM, scale=2.0)
    module, fresh = build(statistics="frozen"), build(statistics="frozen").eval()
    assert torch.equal(module(q, k, v), fresh(q, k, v))
    first = stored(module)
    assert first == pytest.approx((float(q.std()), float(k.std()), 1), rel=1e-6)
    assert_exact(module(q, k, v), build()(q, k, v))
    module(5 * q, 5 * k, v)
    assert stored(module)[:2] == first[:2]


def test_a_running_model_loads_into_a_frozen_one():
    q, k, v = qkv(2, HEADS, LENGTH, DIM, scale=2.0)
    running, frozen = build(statistics="running"), build(statistics="frozen")
    running(q, k, v)
    frozen.load_state_dict(running.state_dict())
    assert torch.equal(frozen(5 * q, k, v), running.eval()(5 * q, k, v))
    assert stored(frozen)[:2] == stored(running)[:2]


@pytest.mark.parametrize("statistics", ["batch", "running", "frozen"])
def test_a_call_without_any_real_token_is_zero_and_spoils_no_statistics(statistics):
    q, k, v = qkv(2, HEADS, LENGTH, DIM, requires_grad=True)
    module = build(statistics=statistics, diag="learnable_scale")
    out = module(q, k, v, torch.zeros(2, LENGTH, dtype=torch.bool))
    out.sum().backward()
    for zero in (out, q.grad, k.grad, v.grad, module.r.grad):
        assert not zero.any()
    assert stored(module)[:2] == (1, 1)


def test_half_precision_inputs_keep_the_state_and_the_mathematics_in_float32():
    module = attention.build("lln", num_heads=HEADS, head_dim=DIM, max_length=128, statistics="running")
    q, k, v = qkv(2, HEADS, LENGTH, DIM, dtype=torch.bfloat16)
    out = module(q, k, v)
    assert out.dtype == torch.bfloat16
    assert module.moments.sigma_key.dtype == torch.float32
    assert torch.equal(out, build()(q.double(), k.double(), v.double()).bfloat16())


# --- causal use


@pytest.mark.parametrize("diag", DIAGS)
def test_causal_outputs_never_see_the_future_not_even_in_the_first_training_call(diag):
    q, k, v = qkv(2, HEADS, 50, DIM)
    module, other = (build(diag=diag, statistics="frozen", causal=True) for _ in range(2))
    changed = [torch.cat((x[:, :, :30], 4 * x[:, :, 30:] + 1), dim=2) for x in (q, k, v)]
    first = module(q, k, v)
    assert torch.equal(first[:, :, :30], other(*changed)[:, :, :30])
    assert torch.equal(module(q, k, v)[:, :, :30], module(*changed)[:, :, :30])
    ones = torch.ones(2, 50, dtype=torch.bool)
    assert_exact(first.detach(), oracle.lln(q, k, v, ones, UNIT, UNIT, mix_of(module), causal=True).detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(diag="mean"), "attention.diag=mean must be one of none, average, learnable_scale, learnable_ratio"),
        (dict(constants="own"), "attention.constants=own must be one of published, head_dim"),
        (dict(statistics="ema"), "attention.statistics=ema must be one of batch, running, frozen"),
        (dict(causal=True), "attention.statistics=batch sees the future; .* statistics=frozen"),
        (dict(causal=True, statistics="running"), "attention.statistics=running sees the future"),
        (dict(impl="cuda"), "attention.impl=cuda is not available"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        build(**options)
    assert "\n" not in str(error.value)
