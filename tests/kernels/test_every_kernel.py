"""What every attention with Triton kernels promises on a GPU: having kernels is what tests it here."""

import copy
from functools import cache
from itertools import product

import pytest
import torch
from profiler import heavy_operators, operators, peak_bytes
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attention
from attention import Attention
from kernels.common.dispatch import choose_impl
from lra.efficiency import timing
from lra.efficiency.baseline import BACKENDS
from lra.efficiency.calls import Inputs, draw, inference, training
from lra.efficiency.cases import BASELINE, Case, table_options
from lra.efficiency.measure import Run

CUDA = torch.device("cuda")
NAMES = [
    name for name in attention.names()
    if "triton" in attention.build(name, num_heads=2, head_dim=32, max_length=64).implementations
]  # fmt: skip
SELECTIONS: dict[str, set[str]] = {}
"""Attention → the top-k or sort of PyTorch that it runs, because a measurement shows that ours is not faster. The
measurement stands in the docstring of the kernels that it is left out of."""

SCORES = dict(mra="its block scores", mra_s="its block scores", routing="its 16-bit keys")
"""Attention → what it keeps that grows faster than the tokens, and is more than SDPA's memory in the longest calls."""

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Each name's tests run in one process, which compiles its kernels once.
each_name = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in NAMES])
each_mask = pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])


def case(name: str, length: int, masked: bool, tokens: int = 131_072) -> Case:
    return Case(name, length, heads=2, head_dim=32, tokens=tokens, masked=masked)


def build(each: Case, device: torch.device = CUDA, impl: str = "triton") -> Attention:
    torch.manual_seed(0)
    sizes = dict(num_heads=each.heads, head_dim=each.head_dim, max_length=each.length)
    return attention.build(each.attention, impl=impl, **sizes, **each.options).to(device)


@pytest.fixture
def kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU only what the host does is left of a call."""
    if not torch.cuda.is_available():
        from triton.runtime.interpreter import InterpretedFunction

        monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)


@cache
def peak_of_sdpa(length: int, masked: bool) -> float:
    """MiB of one call of SDPA's fastest backend on the same shape."""
    each = case(BASELINE, length, masked)
    peak = Run(CUDA).baseline(each, draw(each, CUDA), tuple(BACKENDS)).peak_mem_mib
    assert peak is not None
    return peak


def test_the_profiler_sees_the_work_of_a_reference_forward_and_backward():
    each, cpu = case("mra", 128, masked=True, tokens=256), torch.device("cpu")
    module, inputs = build(each, cpu, impl="reference"), draw(each, cpu)
    found = heavy_operators(training(module, inputs))
    assert {"aten::bmm", "aten::sort"} <= found
    assert heavy_operators(inference(module, inputs)) <= found
    query = inputs.q.detach().requires_grad_()
    assert "aten::_softmax_backward_data" in heavy_operators(lambda: query.softmax(-1).square().sum().backward())
    assert heavy_operators(lambda: (query + 1).sum().backward()) == set()


def test_the_table_gives_options_that_exist():
    for name in attention.names():
        for length in (1024, 4096, 16_384):
            assert table_options(name, length, heads=2).keys() <= attention.options(name).keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels do not run, which takes the interpreter")
@pytest.mark.parametrize("length", [1000, 1024, 4096, 16_384, 65_536])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_allocates_no_more_than_sdpa_held_on_an_h100(name: str, length: int, kernels_do_not_run: None):
    """That is out, dq, dk, dv, dq in float32, and two numbers a query."""
    if length > 16_384 and name in SCORES:
        pytest.skip(f"{name} keeps {SCORES[name]}, which the tables report")
    each, cpu = case(name, length, masked=False), torch.device("cpu")
    q, k, v, cotangent = (torch.empty(each.batch, 2, length, 32, dtype=torch.bfloat16) for _ in range(4))
    inputs = Inputs(*(x.requires_grad_() for x in (q, k, v)), None, cotangent)
    module = build(each, cpu)
    if not module.ready:
        module.set_extra_state(torch.tensor(True))  # Routing's first centroids, of its first call alone
    call = training(module, inputs)
    assert peak_bytes(call) <= 6 * q.nbytes + 2 * 4 * q[..., 0].numel()


def test_an_empty_batch_is_left_to_the_reference():
    sizes = dict(num_heads=2, head_dim=8, max_length=8)
    empty = torch.zeros(0, 2, 5, 8, requires_grad=True)
    for name, key_mask in product(NAMES, (None, torch.zeros(0, 5, dtype=torch.bool))):
        module = attention.build(name, **sizes)
        out = module(empty, empty, empty, key_mask)
        (out.sum() + module.auxiliary_loss()).backward()
        assert out.shape == empty.shape
        assert module.auxiliary_loss() == 0
        assert all(x.isfinite().all() for x in module.state_dict().values())
        with pytest.raises(
            ValueError, match=r"^attention\.impl=triton of \w+ takes at least one sequence, got none; .+$"
        ):
            attention.build(name, impl="triton", **sizes)(empty, empty, empty, key_mask)
    with FakeTensorMode():
        on_card = torch.empty(0, 2, 5, 8, device="cuda")
    assert choose_impl("auto", on_card, ("reference", "triton"), "lln") == "reference"


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_a_gradient_is_refused_in_one_line(name: str, kernels_do_not_run: None):
    """Autograd would take it for zero."""
    module, leaf = attention.build(name, num_heads=2, head_dim=8, max_length=8, impl="triton").eval(), torch.ones(1)
    x = leaf.requires_grad_().expand(1, 2, 5, 8)
    out = module(x, x, x)
    with pytest.raises(RuntimeError, match=r"^the kernels of attention\.impl=triton .+ attention\.impl=reference$"):
        torch.autograd.grad(out.sum(), leaf, create_graph=True)


def test_a_module_tells_the_implementation_that_runs():
    for name, (head_dim, expected) in product(NAMES, [(128, "triton"), (136, "reference")]):
        module = attention.build(name, num_heads=2, head_dim=head_dim, max_length=8)
        assert module.implementation(CUDA) == expected


class Rows(TorchDispatchMode):
    """Inside, every launch is an assertion that its (B, H, N, D) have contiguous rows; `launches` names them."""

    def __init__(self):
        super().__init__()
        self.launches: list[str] = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "lra":
            self.launches.append(str(operator))
            strides = [x.stride(-1) for x in arguments if isinstance(x, torch.Tensor) and x.dim() == 4]
            assert set(strides) <= {1}, f"{operator}: last strides {strides}"
        return operator(*arguments, **(options or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a backward pass on a card is a thread of its own")
@pytest.mark.parametrize("name", NAMES)
def test_any_strides_reach_the_kernels_as_rows(name: str, kernels_do_not_run: None):
    """Columns as rows, one row for all tokens, and the gradient of a sum, which is one number everywhere."""
    module = attention.build(name, num_heads=2, head_dim=8, max_length=8, impl="triton").eval()
    leaf = torch.ones(1, 2, 8, 5, requires_grad=True)
    with Rows() as rows:
        module(leaf.mT, leaf.mT, leaf[..., :1].mT.expand(-1, -1, 5, -1)).sum().backward()
    assert {"forward", "backward"} <= {launch.rpartition("_")[2].removesuffix(".default") for launch in rows.launches}


@torch.no_grad()
def test_a_mask_of_any_strides_is_the_same_mask():
    device = CUDA if torch.cuda.is_available() else torch.device("cpu")
    x = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0)).to(device)
    columns = torch.tensor([[True, False], [True, True], [False, True], [True, True], [True, False]], device=device)
    for name in ("lln", "mra"):  # the interpreter is slow, and all take the strides from one function
        module = attention.build(name, num_heads=1, head_dim=8, max_length=8, impl="triton").to(device).eval()
        assert torch.equal(module(x, x, x, columns.T), module(x, x, x, columns.T.contiguous())), name


@pytest.mark.gpu
@on_gpu
@each_mask
@each_name
def test_a_call_runs_no_matmul_softmax_or_scatter_of_pytorch(name: str, masked: bool):
    each = case(name, 1024, masked)
    module, inputs = build(each), draw(each, CUDA)
    for call in (training(module, inputs), inference(module, inputs)):
        call()  # compiles; whatever a first call sets up
        seen = operators(call)
        assert any(op.startswith("lra::") for op in seen), "no kernel of ours ran"
        assert heavy_operators(call) <= SELECTIONS.get(name, set())


@pytest.mark.gpu
@on_gpu
@each_mask
@pytest.mark.parametrize("length", [1024, 4096, 16_384])
@each_name
def test_a_call_takes_no_more_memory_than_sdpa(name: str, length: int, masked: bool):
    each = case(name, length, masked)
    call = training(build(each), draw(each, CUDA))
    call()
    peak = timing.peak_memory(call, CUDA)
    assert peak is not None
    assert peak <= peak_of_sdpa(length, masked)


@pytest.mark.gpu
@on_gpu
@each_mask
@pytest.mark.parametrize("length", [1000, 4096])
@each_name
def test_the_same_inputs_give_the_same_bits_twice(name: str, length: int, masked: bool):
    each = case(name, length, masked)
    module, inputs = build(each), draw(each, CUDA)
    training(module, inputs)()
    twin = copy.deepcopy(module)
    first, second = training(module, inputs)(), training(twin, inputs)()
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for key, value in module.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


@pytest.mark.gpu
@on_gpu
@each_mask
@each_name
def test_a_training_step_replays_from_a_cuda_graph(name: str, masked: bool):
    each = case(name, 2048, masked)
    module, inputs = build(each), draw(each, CUDA)
    prepared = timing.prepare(training(module, inputs), CUDA)
    assert prepared.how == "graph", "the call cannot be captured"
    twin = build(each)
    twin.load_state_dict(module.state_dict())
    expected = training(twin, inputs)()
    prepared.run()
    assert prepared.made is not None
    for a, b in zip(prepared.made, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for key, value in module.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key
