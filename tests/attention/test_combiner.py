"""The Combiner module: names, options, and that it calls the mathematics with what it was built with."""

import pytest
import torch
from inputs import padding, qkv

import attention
from kernels.combiner import PATTERNS, combiner

SHAPE = {"num_heads": 2, "head_dim": 8, "max_length": 64}


def test_each_name_has_its_pattern():
    patterns = {name: attention.options(name)["pattern"] for name in attention.names() if name.startswith("combiner")}
    assert patterns == {"combiner": "fixed", "combiner_logsparse": "logsparse", "combiner_axial": "axial"}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_module_is_the_function(pattern, causal):
    q, k, v = qkv(2, 2, 50, 8)
    key_mask = padding(2, 50, kind="suffix")
    module = attention.build("combiner", **SHAPE, causal=causal, pattern=pattern, segment_length=7)
    expected = combiner(q, k, v, key_mask, pattern=pattern, segment_length=7, causal=causal)
    out = module(q, k, v, key_mask)
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()
    assert not list(module.parameters())


@pytest.mark.parametrize("name", ["combiner", "combiner_axial"])
def test_the_own_span_can_be_counted_twice(name):
    q, k, v = qkv(2, 2, 50, 8)
    once = attention.build(name, **SHAPE, segment_length=8)(q, k, v)
    twice = attention.build(name, **SHAPE, segment_length=8, include_own_span=True)(q, k, v)
    assert not torch.allclose(once, twice)


@pytest.mark.parametrize("name", ["combiner", "combiner_logsparse", "combiner_axial"])
def test_autocast_changes_nothing(name):
    q, k, v = qkv(2, 2, 50, 8, dtype=torch.bfloat16)
    module = attention.build(name, **SHAPE, segment_length=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(q, k, v)
    assert torch.equal(out, module(q, k, v))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"pattern": "diagonal"}, r"attention\.pattern=diagonal"),
        ({"segment_length": -1}, r"attention\.segment_length=-1"),
        ({"include_own_span": True, "causal": True}, r"attention\.include_own_span=True"),
        ({"impl": "triton", "pattern": "axial_vertical"}, r"attention\.impl=triton of combiner has pattern=.+"),
        ({"block_size": 3}, r"attention\.block_size is not an option of combiner"),
    ],
)
def test_bad_options_are_refused_when_built(bad, message):
    with pytest.raises(ValueError, match=message):
        attention.build("combiner", **SHAPE, **bad)
