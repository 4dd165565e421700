"""What competes for the baseline of a masked row."""

import pytest
import torch
from segments import backward, forward

import attention
from kernels.softmax import ops
from lra.efficiency import baseline
from lra.efficiency.calls import draw
from lra.efficiency.cases import Case

CPU = torch.device("cpu")
MASKED = Case("softmax", 70, heads=2, head_dim=32, tokens=140, masked=True)


def test_with_a_mask_attention_without_padding_competes():
    cuda = torch.device("cuda")
    assert set(baseline.paths(cuda, masked=True)) - set(baseline.paths(cuda, masked=False)) == {"varlen"}
    assert baseline.paths(CPU, masked=True) == ("default",)


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 runs in the interpreter only")
def test_it_is_softmax_attention(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "flash_forward", forward)
    monkeypatch.setattr(ops, "flash_backward", backward)
    monkeypatch.setattr(baseline, "packed_attention", ops.packed_attention)
    sizes = dict(num_heads=MASKED.heads, head_dim=MASKED.head_dim, max_length=MASKED.length)
    q, k, v, mask, _ = draw(MASKED, CPU, torch.float32)
    inputs = (q.detach(), k.detach(), v.detach(), mask)
    torch.testing.assert_close(baseline.build("varlen", **sizes)(*inputs), attention.build("softmax", **sizes)(*inputs))
