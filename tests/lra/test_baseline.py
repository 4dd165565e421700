"""What competes for the baseline of a masked row."""

import pytest
import torch

import attention
from attention.softmax import tiled_attention
from lra.efficiency import baseline
from lra.efficiency.calls import draw
from lra.efficiency.cases import Case

CPU = torch.device("cpu")
MASKED = Case("softmax", 200, heads=2, head_dim=32, tokens=128, masked=True)


def test_with_a_mask_compiled_flex_attention_competes():
    cuda = torch.device("cuda")
    assert set(baseline.paths(cuda, masked=True)) - set(baseline.paths(cuda, masked=False)) == {"flex"}
    assert baseline.paths(CPU, masked=True) == ("default",)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_it_is_softmax_attention(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(baseline, "_compiled", lambda: tiled_attention)
    sizes = dict(num_heads=MASKED.heads, head_dim=MASKED.head_dim, max_length=MASKED.length)
    q, k, v, mask, _ = draw(MASKED, CPU, torch.float32)
    inputs = (q.detach(), k.detach(), v.detach(), mask)
    torch.testing.assert_close(baseline.build("flex", **sizes)(*inputs), attention.build("softmax", **sizes)(*inputs))
