"""Exact attention over tiles is softmax attention, and leaves out only tiles of padding."""

import pytest
import torch
from inputs import padding

import attention
from lra.efficiency import baseline, tiled
from lra.efficiency.calls import draw
from lra.efficiency.cases import Case

CPU = torch.device("cpu")
MASKED = Case("softmax", 200, heads=2, head_dim=32, tokens=128, masked=True)


def test_with_a_mask_compiled_flex_attention_competes():
    cuda = torch.device("cuda")
    assert set(baseline.paths(cuda, masked=True)) - set(baseline.paths(cuda, masked=False)) == {"flex"}
    assert baseline.paths(CPU, masked=True) == ("default",)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_over_tiles_is_softmax(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(baseline, "_compiled", lambda: tiled.tiled_attention)
    sizes = dict(num_heads=MASKED.heads, head_dim=MASKED.head_dim, max_length=MASKED.length)
    q, k, v, mask, _ = draw(MASKED, CPU, torch.float32)
    inputs = (q.detach(), k.detach(), v.detach(), mask)
    torch.testing.assert_close(baseline.build("flex", **sizes)(*inputs), attention.build("softmax", **sizes)(*inputs))


@pytest.mark.parametrize("kind", ["suffix", "scattered", "one", "empty"])
def test_tiles_hold_every_pair_of_real_tokens_and_skip_what_has_none(kind: str):
    mask = padding(3, 300, kind=kind)
    dense = tiled.tiles(mask).to_dense()[:, 0]
    some = torch.nn.functional.pad(mask, (0, 84)).unflatten(1, (3, 128)).any(-1)
    assert torch.equal(dense.bool(), some[:, :, None] & some[:, None, :])
