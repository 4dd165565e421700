"""What every registered attention promises (`attention.base.Attention`): registering a name is what tests it here."""

import copy
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import padding, qkv
from omegaconf import OmegaConf
from tolerance import assert_as_good_as, assert_exact
from torch import Tensor

import attention
from attention.base import Attention

CONF = Path(__file__).parents[2] / "conf" / "attention"
BATCH, HEADS = 3, 2
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 100)
MASKS = (None, "suffix", "scattered", "one", "empty")
DIMS = (8, 24, 128)
# All pairs of (length, mask), (length, dim) and (mask, dim), not the full product.
CASES = [(length, mask, DIMS[i % len(DIMS)]) for i, (length, mask) in enumerate(product(LENGTHS, MASKS))]
PAIRS = sorted({(length, dim) for length, _, dim in CASES})

each_name = pytest.mark.parametrize("name", attention.names())


def build(name: str, *, dim: int = 8, length: int = 100, seed: int = 0, **options) -> Attention:
    """The attention in float64, its parameters and random buffers drawn from `seed`."""
    torch.manual_seed(seed)
    return attention.build(name, num_heads=HEADS, head_dim=dim, max_length=length, **options).double()


def build_independent(name: str, **arguments) -> Attention:
    """The attention in the mode in which batch mates do not matter."""
    return build(name, **arguments, **type(build(name)).batch_independent_options).eval()


def key_mask(kind: str | None, length: int, batch: int = BATCH) -> Tensor | None:
    return None if kind is None else padding(batch, length, kind=kind)


@dataclass
class Result:
    """All that one call and its backward pass leave behind."""

    out: Tensor
    auxiliary: Tensor
    gradients: list[Tensor]  # of q, k, v, then of the parameters
    state: dict[str, Tensor]  # after the call


def call(module: Attention, inputs: list[Tensor], mask: Tensor | None, auxiliary: bool = True) -> Result:
    """Forward and backward on a copy of `module`, which itself keeps its state.

    The cotangent is the same for every batch entry and not zero anywhere, at padded queries neither.
    """
    module = copy.deepcopy(module)
    torch.manual_seed(1)
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = module(*inputs, mask)
    cotangent = torch.cos(torch.arange(out[0].numel(), dtype=torch.float64)).view(out.shape[1:]).to(out.dtype)
    loss = (out * cotangent).sum() + (module.auxiliary_loss() if auxiliary else 0.0)
    gradients = torch.autograd.grad(loss, [*inputs, *module.parameters()], allow_unused=True, materialize_grads=True)
    return Result(out.detach(), module.auxiliary_loss().detach(), list(gradients), module.state_dict())


def assert_same(actual: Result, expected: Result, where: Tensor | None = None) -> None:
    """Two results agree to float64 rounding: state, parameters, and outputs and input gradients where (B, N) holds."""
    rows = torch.ones_like(expected.out[:, 0, :, 0], dtype=torch.bool) if where is None else where
    rows = rows[:, None, :, None].expand_as(expected.out)
    assert_exact(actual.out[rows], expected.out[rows], "output")
    assert_exact(actual.auxiliary, expected.auxiliary, "auxiliary loss")
    # Gradients as one vector: that of q alone may be a zero, and its rounding then has no relative size.
    assert_exact(*(torch.cat([g[rows] for g in r.gradients[:3]]) for r in (actual, expected)), "gradient of q, k, v")
    for mine, other in zip(actual.gradients[3:], expected.gradients[3:], strict=True):
        assert_exact(mine, other, "gradient of a parameter")
    for key, value in expected.state.items():
        assert_exact(actual.state[key], value, f"state {key}")


def assert_finite(result: Result) -> None:
    for value in (result.out, result.auxiliary, *result.gradients, *result.state.values()):
        assert value.isfinite().all()


def disturb(inputs: list[Tensor], where: Tensor, scale: float) -> list[Tensor]:
    """The inputs with other values at the (B, N) positions where `where` holds."""
    others = qkv(*inputs[0].shape, seed=99, scale=scale, dtype=inputs[0].dtype)
    return [torch.where(where[:, None, :, None], other, x) for x, other in zip(inputs, others, strict=True)]


# ---------------------------------------------------------------------------------------- shapes, layout, padding


@each_name
@pytest.mark.parametrize(("length", "dim"), PAIRS)
def test_output_has_the_contracts_form_and_padding_never_matters(name: str, length: int, dim: int):
    module = build(name, dim=dim)
    inputs = qkv(BATCH, HEADS, length, dim)
    for kind in [kind for n, kind, d in CASES if (n, d) == (length, dim)]:
        mask = key_mask(kind, length)
        result = call(module, inputs, mask)
        assert result.out.shape == inputs[0].shape
        assert result.out.dtype == torch.float64
        assert result.out.transpose(1, 2).is_contiguous()
        assert result.auxiliary.shape == ()
        assert_finite(result)
        if mask is None:
            continue
        padded = ~mask[:, None, :, None].expand_as(result.out)
        assert (result.out[padded] == 0).all(), "rows of padded queries are zero"
        assert all((gradient[padded] == 0).all() for gradient in result.gradients[:3]), "padding gets no gradient"
        # 1e4: exp(1e4) overflows, so that a 0 · inf or an inf - inf anywhere shows.
        assert_same(call(module, disturb(inputs, ~mask, scale=1e4), mask), result, where=mask)


@each_name
def test_long_input_keeps_the_contract(name: str):
    module = build(name, dim=32, length=1000)
    inputs, mask = qkv(BATCH, HEADS, 1000, 32), key_mask("suffix", 1000)
    result = call(module, inputs, mask)
    assert result.out.shape == inputs[0].shape
    assert_finite(result)
    assert_same(call(module, disturb(inputs, ~mask, scale=10.0), mask), result, where=mask)


@each_name
def test_no_mask_is_a_mask_of_only_real_tokens(name: str):
    module, inputs = build(name), qkv(BATCH, HEADS, 65, 8)
    assert_same(call(module, inputs, torch.ones(BATCH, 65, dtype=torch.bool)), call(module, inputs, None))


@each_name
def test_batch_without_any_real_token_gives_zeros_and_zero_gradients(name: str):
    result = call(build(name), qkv(BATCH, HEADS, 33, 8), torch.zeros(BATCH, 33, dtype=torch.bool))
    assert_finite(result)
    assert (result.out == 0).all()
    assert all((gradient == 0).all() for gradient in result.gradients[:3])


@each_name
@settings(max_examples=6, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_mask_any_length(name: str, data: st.DataObject):
    length = data.draw(st.integers(1, 80), label="length")
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor(data.draw(st.lists(bits, min_size=1, max_size=2), label="mask"))
    scale = data.draw(st.sampled_from([1e-2, 1.0, 5.0]), label="scale")
    module, inputs = build(name, length=80), qkv(len(mask), HEADS, length, 8, scale=scale)
    result = call(module, inputs, mask)
    assert_finite(result)
    padded = ~mask[:, None, :, None].expand_as(result.out)
    assert (result.out[padded] == 0).all()
    assert_same(call(module, disturb(inputs, ~mask, scale=100 * scale), mask), result, where=mask)


# ---------------------------------------------------------------------------------------- independence, determinism


@each_name
@pytest.mark.parametrize("kind", [None, "scattered", "empty"])
def test_batch_mates_and_batch_order_never_matter(name: str, kind: str | None):
    module, inputs, mask = build_independent(name, dim=32), qkv(BATCH, HEADS, 65, 32), key_mask(kind, 65)

    def rows(index: list[int]) -> Result:
        chosen = None if mask is None else mask[index]
        return call(module, [x[index] for x in inputs], chosen, auxiliary=False)

    together, turned = rows([0, 1, 2]), rows([2, 0, 1])
    for i, place in enumerate([1, 2, 0]):
        alone = rows([i])
        for result, j in ((together, i), (turned, place)):
            assert_exact(result.out[j], alone.out[0], f"output of sequence {i}")
            gradients, expected = (torch.stack(r.gradients[:3], dim=1) for r in (result, alone))
            assert_exact(gradients[j], expected[0], f"gradient of sequence {i}")


@each_name
def test_evaluation_leaves_the_state_alone_and_repeats_itself(name: str):
    module, inputs, mask = build(name).eval(), qkv(BATCH, HEADS, 33, 8), key_mask("suffix", 33)
    before = copy.deepcopy(module.state_dict())
    first, second = module(*inputs, mask), module(*inputs, mask)
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@each_name
def test_causal_form_never_sees_the_future_or_is_refused_in_one_line(name: str):
    for options in ({}, type(build(name)).batch_independent_options):
        try:
            module = build(name, causal=True, **options).eval()
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = None
        if refusal is not None:
            assert "causal" in refusal
            assert "\n" not in refusal
            continue
        for kind, cut in ((None, 1), (None, 40), ("scattered", 33)):
            inputs, mask = qkv(BATCH, HEADS, 65, 8), key_mask(kind, 65)
            future = (torch.arange(65) >= cut).expand(BATCH, 65)
            past, other = module(*inputs, mask), module(*disturb(inputs, future, scale=10.0), mask)
            assert_exact(other[:, :, :cut], past[:, :, :cut], f"outputs before {cut}")
            assert not torch.allclose(other[:, :, cut:], past[:, :, cut:])


# ---------------------------------------------------------------------------------------- numerics, layouts, state


@each_name
@pytest.mark.parametrize("scale", [1e-3, 1e-1, 1e1, 1e2])
def test_gradients_are_finite_at_every_input_scale(name: str, scale: float):
    module = build(name, dim=32).float()
    for kind in ("scattered", "empty"):
        inputs = qkv(BATCH, HEADS, 65, 32, scale=scale, dtype=torch.float32)
        assert_finite(call(module, inputs, key_mask(kind, 65)))


@each_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_only_the_rounding_of_the_output(name: str, dtype: torch.dtype):
    module, mask = build(name, dim=32).float(), key_mask("suffix", 65)
    inputs = qkv(BATCH, HEADS, 65, 32, dtype=dtype)
    single, half = call(module, [x.float() for x in inputs], mask), call(module, inputs, mask)
    assert_finite(half)
    assert half.out.dtype == dtype
    assert all(gradient.dtype == dtype for gradient in half.gradients[:3])
    assert {key: value.dtype for key, value in half.state.items()} == {
        key: value.dtype for key, value in single.state.items()
    }
    assert_as_good_as(half.out, single.out.to(dtype), single.out, "output")


@each_name
def test_autocast_changes_nothing(name: str):
    module, inputs = build(name).float().eval(), qkv(BATCH, HEADS, 33, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(*inputs)
    assert torch.equal(inside, module(*inputs))


@each_name
def test_strided_views_of_a_fused_projection_work(name: str):
    module, mask = build(name), key_mask("scattered", 65)
    fused = torch.stack(qkv(BATCH, HEADS, 65, 8)).permute(1, 3, 0, 2, 4).contiguous()  # (B, N, 3, H, D)
    views = [fused[:, :, i].transpose(1, 2) for i in range(3)]
    assert not views[0].is_contiguous()
    fused.requires_grad_()
    out = copy.deepcopy(module)(*(fused[:, :, i].transpose(1, 2) for i in range(3)), mask)
    assert out.transpose(1, 2).is_contiguous()
    (gradient,) = torch.autograd.grad(out.square().sum(), fused)
    inputs = [view.detach().contiguous().requires_grad_() for view in views]
    expected = copy.deepcopy(module)(*inputs, mask)
    gradients = torch.autograd.grad(expected.square().sum(), inputs, allow_unused=True, materialize_grads=True)
    assert_exact(out.detach(), expected.detach(), "output")
    assert_exact(gradient, torch.stack(gradients).permute(1, 3, 0, 2, 4), "gradient")


@each_name
def test_state_dict_continues_training_where_it_was_saved(name: str):
    mask = key_mask("suffix", 65)

    def step(module: Attention, i: int) -> Tensor:
        torch.manual_seed(i)
        out = module(*qkv(BATCH, HEADS, 65, 8, seed=i), mask)
        loss = out.square().sum() + module.auxiliary_loss()
        parameters = list(module.parameters())
        if loss.requires_grad:
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                p.data -= 0.0 if g is None else 0.01 * g
        return out.detach()

    module, fresh = build(name, seed=0), build(name, seed=1)
    for i in range(3):
        step(module, i)
    fresh.load_state_dict(copy.deepcopy(module.state_dict()))
    for i in (3, 4):
        assert torch.equal(step(fresh, i), step(module, i))
    state = module.state_dict()
    assert state.keys() == fresh.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())


# ---------------------------------------------------------------------------------------- refusals, configuration

BAD_CALLS = {
    "three dimensions": lambda q, m: ((q[0], q[0], q[0]), m),
    "unequal lengths": lambda q, m: ((q, q[:, :, :8], q), m),
    "other head count": lambda q, m: ((q[:, :1], q[:, :1], q[:, :1]), m),
    "other head_dim": lambda q, m: ((q[..., :4], q[..., :4], q[..., :4]), m),
    "no tokens": lambda q, m: ((q[:, :, :0], q[:, :, :0], q[:, :, :0]), m[:, :0]),
    "longer than max_length": lambda q, m: ((q.repeat(1, 1, 9, 1),) * 3, m.repeat(1, 9)),
    "mixed dtypes": lambda q, m: ((q, q.float(), q), m),
    "integer inputs": lambda q, m: ((q.long(), q.long(), q.long()), m),
    "float mask": lambda q, m: ((q, q, q), m.float()),
    "mask of another length": lambda q, m: ((q, q, q), m[:, :-1]),
    "mask of another batch": lambda q, m: ((q, q, q), m[:-1]),
}


@each_name
def test_bad_calls_are_refused_in_one_line(name: str):
    module, q, mask = build(name), qkv(BATCH, HEADS, 16, 8)[0], torch.ones(BATCH, 16, dtype=torch.bool)
    for what, spoil in BAD_CALLS.items():
        inputs, bad_mask = spoil(q, mask)
        with pytest.raises((ValueError, TypeError)) as refusal:
            module(*inputs, bad_mask)
        assert "\n" not in str(refusal.value), what


@each_name
@pytest.mark.parametrize("key", ["num_heads", "head_dim", "max_length"])
def test_bad_sizes_are_refused_in_one_line(name: str, key: str):
    for value in (0, -1, 1.5, True):
        sizes = {"num_heads": 2, "head_dim": 8, "max_length": 64, key: value}
        with pytest.raises(ValueError, match=rf"^attention\.{key}={value!r} .+$"):
            attention.build(name, **sizes)


@each_name
def test_unknown_impl_is_refused_in_one_line(name: str):
    with pytest.raises(ValueError, match=r"^attention\.impl=cuda .+$"):
        attention.build(name, num_heads=2, head_dim=8, max_length=64, impl="cuda")


@each_name
def test_config_holds_exactly_the_options_and_their_defaults(name: str):
    path = CONF / f"{name}.yaml"
    assert path.read_text().startswith("# "), f"the first line of {path.name} says what it is"
    config = OmegaConf.to_container(OmegaConf.load(path))
    options = attention.options(name)
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    assert list(config) == ["name", "impl", *defaults]
    assert config == {"name": name, "impl": "auto", **defaults}
    assert all(type(config[key]) is type(value) for key, value in defaults.items())
    attention.build(config.pop("name"), num_heads=2, head_dim=8, max_length=64, **config)
