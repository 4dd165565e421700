"""The drop-in layer: an attention between its projections, in an encoder that is nothing but PyTorch."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import padding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attention
from attention import SelfAttention

ROOT = Path(__file__).parents[2]
DIM, HEADS, LENGTH = 16, 2, 40

each_name = pytest.mark.parametrize("name", attention.names())


def make(name: str, **options) -> SelfAttention:
    torch.manual_seed(0)
    return attention.layer(name, DIM, HEADS, max_length=64, **options)


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed))


class Encoder(nn.Module):
    """Two blocks and a mean, as somebody else would write them."""

    def __init__(self, name: str):
        super().__init__()
        self.layers = nn.ModuleList(make(name) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.head = nn.Linear(DIM, 1)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), key_mask)
        return self.head(x.mean(1)).squeeze(-1)


@each_name
def test_it_is_the_attention_between_two_linear_maps(name: str):
    layer, x, mask = make(name).eval(), tokens(), padding(2, LENGTH)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    heads = (y.unflatten(-1, (HEADS, DIM // HEADS)).transpose(1, 2) for y in (q, k, v))
    core = layer.core(*heads, mask)
    expected = layer.out(torch.cat([core[:, h] for h in range(HEADS)], dim=-1))
    torch.testing.assert_close(layer(x, mask), expected)
    torch.testing.assert_close(layer(x, mask)[~mask], layer.out.bias.expand(int((~mask).sum()), DIM))


@each_name
def test_an_encoder_trains_and_what_it_saved_answers_alike(name: str):
    encoder = Encoder(name)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    x, mask, target = tokens(4), padding(4, LENGTH), torch.tensor([0.0, 1.0, 2.0, 3.0])
    losses = []
    for _ in range(8):
        loss = (encoder(x, mask) - target).square().mean()
        losses.append(loss.item())
        (loss + sum(layer.auxiliary_loss() for layer in encoder.layers)).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]

    torch.manual_seed(7)
    loaded = Encoder(name)
    loaded.load_state_dict(copy.deepcopy(encoder.state_dict()))
    with torch.inference_mode():
        answers = [module.eval()(x, mask) for module in (encoder, loaded)]
    assert torch.equal(*answers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamra", "combiner", "lln_diag", "mra", "routing"])
def test_an_encoder_compiles_whole_to_train_and_exports_to_answer(name: str):
    encoder, x, mask, cotangent = Encoder(name), tokens(4), padding(4, LENGTH), torch.arange(4.0)
    encoder(x, mask)  # Routing's first centroids
    twin = copy.deepcopy(encoder)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    for eager, other in ((encoder, compiled), (encoder.eval(), compiled.eval())):
        expected, actual = eager(x, mask), other(x, mask)
        torch.testing.assert_close(actual, expected)
        parameters = (list(module.parameters()) for module in (encoder, twin))
        gradients = (
            torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
            for out, leaves in zip((expected, actual), parameters, strict=True)
        )
        for mine, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, wanted)
    for key, value in encoder.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value)

    exported = torch.export.export(encoder, (x, mask)).module()
    torch.testing.assert_close(exported(tokens(4, seed=1), mask), encoder(tokens(4, seed=1), mask))


@pytest.mark.parametrize("name", ["adamra", "routing", "lln", "softmax"])
def test_the_state_is_what_the_docstring_says(name: str):
    own = {key for key in make(name).state_dict() if not key.startswith(("qkv.", "out."))}
    moments = {"core.moments.sigma_query", "core.moments.sigma_key", "core.moments.calls"}
    expected = {
        "adamra": {"core.router", *moments},
        "lln": moments,
        "routing": {"core.centroids", "core.ema_counts", "core.ema_sums", "core._extra_state"},
        "softmax": set(),
    }
    assert own == expected[name]


def test_training_moves_the_centroids_and_evaluation_does_not():
    layer, x = make("routing"), tokens()
    layer(x)
    before = layer.core.centroids.clone()  # set up by the first call
    layer.eval()(x)
    assert torch.equal(layer.core.centroids, before)
    layer.train()(tokens(seed=1))
    assert not torch.equal(layer.core.centroids, before)


def test_autocast_runs_the_attention_in_half_precision():
    layer, seen = make("lln"), []
    layer.core.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(tokens())
    assert (seen, out.dtype) == ([torch.bfloat16], torch.bfloat16)


def test_causal_layers_see_no_future():
    layer, x = make("softmax", causal=True).eval(), tokens()
    other = torch.cat([x[:, :20], tokens(seed=5)[:, 20:]], dim=1)
    torch.testing.assert_close(layer(other)[:, :20], layer(x)[:, :20])
    with pytest.raises(ValueError, match="causal"):
        make("mra", causal=True)


def test_sizes_that_do_not_fit_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^attention\.num_heads=3 does not divide dim=16; give head_dim$"):
        attention.layer("lln", 16, 3, max_length=64)
    with pytest.raises(ValueError, match=r"^attention\.num_heads=0 "):
        attention.layer("lln", 16, 0, max_length=64)
    for dim in (0, -16, 16.0, "16"):
        with pytest.raises(ValueError, match=rf"^dim={dim!r} must be a positive integer$"):
            attention.layer("lln", dim, 2, head_dim=8, max_length=64)
    with pytest.raises(ValueError, match=r"^attention\.blocks is not an option of mra"):
        make("mra", blocks=3)
    wide = attention.layer("lln", 16, 3, head_dim=8, max_length=64, bias=False)
    assert wide(tokens()).shape == (2, LENGTH, 16)
    assert {key for key, _ in wide.named_parameters()} == {"qkv.weight", "out.weight"}


def test_tokens_of_another_shape_are_refused_in_one_line():
    layer = make("lln")
    for x in (tokens()[0], tokens()[None], tokens()[..., :8]):
        with pytest.raises(ValueError, match=rf"^x must be \(B, N, dim\) with dim={DIM}, got \(.+\)$"):
            layer(x)


def test_the_implementation_is_the_one_asked_for():
    assert make("lln", impl="reference").core.impl == "reference"
    with pytest.raises(ValueError, match=r"^attention\.impl=triton is not available for LinearAttention; "):
        make("linear", impl="triton")


@pytest.mark.parametrize("name", ["adamra", "routing"])
def test_a_layer_in_the_middle_of_training_can_be_copied_and_pickled(name: str):
    """Its auxiliary loss holds a graph, which can be neither."""
    layer, x = make(name), tokens()
    layer(x)
    assert layer.auxiliary_loss().requires_grad
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.auxiliary_loss() == 0
        assert torch.equal(twin(x), copy.deepcopy(layer)(x))


def test_a_copy_of_an_attention_compiled_in_place_is_no_longer_tied_to_it():
    layer = make("lln")
    layer.core.compile(backend="eager")  # a bound method of `core`, which a copy must not call
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.core._compiled_call_impl is None


@pytest.mark.parametrize("name", ["adamra", "routing"])
def test_activation_checkpointing_gives_the_same_gradients_and_moves_the_state_twice(name: str):
    plain, x = make(name), tokens()
    plain(x)  # Routing's first centroids
    twin = copy.deepcopy(plain)
    gradients = []
    for layer, call in ((plain, plain), (twin, lambda x: checkpoint(twin, x, use_reentrant=False))):
        loss = call(x).square().sum() + 100 * layer.auxiliary_loss()
        gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted)
    plain(x)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value)


def test_the_example_of_the_readme_runs_without_the_harness(tmp_path: Path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (example,) = (block for block in blocks if "attention.layer" in block)
    program = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{example}\n"
    program += "assert all(p.grad is not None for p in blocks.parameters())\n"
    program += "assert not {'lra', 'hydra', 'lightning', 'pandas'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
