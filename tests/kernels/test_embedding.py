"""The look-up is PyTorch's, and its gradient what PyTorch computes in float64."""

import pytest
import torch
from guards import guarded_allocations
from torch.nn import functional

from kernels.embedding import triton
from kernels.embedding.ops import embedding, table_gradient  # on a CPU the entry point takes PyTorch's own


def gradients(tokens: torch.Tensor, table: torch.Tensor, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the table, by `embedding` in float32 and by PyTorch in float64."""
    mine, exact = table.float().requires_grad_(), table.double().requires_grad_()
    out = embedding(tokens, mine)
    assert torch.equal(out, functional.embedding(tokens.long(), mine))
    with guarded_allocations():
        (actual,) = torch.autograd.grad(out, mine, cotangent.float())
    (wanted,) = torch.autograd.grad(functional.embedding(tokens.long(), exact), exact, cotangent.double())
    return actual, wanted


@pytest.mark.parametrize(
    ("rows", "dim", "shape", "dtype"),
    [(15, 8, (3, 70), torch.uint8), (257, 24, (2, 100), torch.int64), (300, 64, (1, 1), torch.int32)],
)
def test_the_gradient_is_that_of_float64_rounded(rows, dim, shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, min(rows, 255), shape, generator=generator).to(device, dtype)
    tokens[..., shape[-1] // 2 :] = 0  # padding
    table = torch.randn(rows, dim, generator=generator).to(device)
    cotangent = torch.randn(*shape, dim, generator=generator).to(device)
    actual, wanted = gradients(tokens, table, cotangent)
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-6, atol=1e-5)
    again, _ = gradients(tokens, table, cotangent)
    assert torch.equal(actual, again)


def test_rows_that_occur_once_among_many_tokens_are_found(device, monkeypatch):
    """A block of rows is passed over where no token asks for it: not where only the last one does."""
    monkeypatch.setattr(triton, "PARTS", 2)
    monkeypatch.setattr(triton, "SCAN", 64)
    tokens, table = torch.zeros(600, dtype=torch.int32, device=device), torch.randn(700, 8, device=device)
    tokens[299], tokens[599] = 300, 699
    cotangent = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)).to(device)
    actual, wanted = gradients(tokens, table, cotangent)
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-6, atol=1e-5)
    assert wanted.any(1).nonzero().flatten().tolist() == [0, 300, 699]


def test_a_strided_or_expanded_cotangent_is_taken(device):
    tokens, table = torch.tensor([[1, 2], [2, 2]], device=device), torch.randn(4, 8, device=device)
    actual, wanted = gradients(tokens, table, torch.ones((), device=device).expand(2, 2, 8))
    torch.testing.assert_close(actual.double(), wanted)
    assert wanted[:, 0].tolist() == [0, 1, 3, 0]


def test_the_operator_passes_opcheck(device):
    arguments = (torch.randn(6, 8, device=device), torch.tensor([0, 1, 1, 3, 0, 2], device=device), 5)
    torch.library.opcheck(table_gradient, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    tokens, table = torch.tensor([[1, 2, 3]], device=device), torch.randn(4, 8, device=device).requires_grad_()

    def call(tokens: torch.Tensor) -> torch.Tensor:
        return embedding(tokens, table).square().sum()

    compiled = torch.compile(call, fullgraph=True)
    (mine,), (other,) = (torch.autograd.grad(f(tokens), table) for f in (compiled, call))
    torch.testing.assert_close(mine, other)
