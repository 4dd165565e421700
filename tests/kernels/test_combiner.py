"""Combiner's reference against its brute-force oracle, its reductions, and what padding and causality promise."""

import pytest
import torch
from inputs import padding, qkv
from oracles.combiner import attention_matrix, partition
from tolerance import assert_exact

from kernels.combiner import PATTERNS, combiner

OWN_SPAN = ("fixed", "axial")
FORMS = [(pattern, causal, False) for pattern in PATTERNS for causal in (False, True)] + [
    (pattern, False, True) for pattern in OWN_SPAN
]
FORM_IDS = [f"{p}-{'causal' if c else 'bidirectional'}{'-own' if own else ''}" for p, c, own in FORMS]
forms = pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)


def options(form: tuple[str, bool, bool], segment_length: int = 8) -> dict:
    pattern, causal, include_own_span = form
    return {
        "pattern": pattern,
        "causal": causal,
        "include_own_span": include_own_span,
        "segment_length": segment_length,
    }


def softmax(q, k, v, key_mask=None, causal=False):
    logits = q @ k.mT / q.shape[-1] ** 0.5
    length = q.shape[2]
    hidden = torch.zeros(1, 1, length, length, dtype=torch.bool)
    if causal:
        hidden = hidden | torch.ones(length, length, dtype=torch.bool).triu(1)
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None, :]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def assert_agrees(form, segment_length, length, key_mask, seed=0):
    """Output and the gradients of q, k, v, in float64, against the oracle."""
    inputs = qkv(2, 2, length, 4, seed=seed, scale=1.5, requires_grad=True)
    weight = qkv(2, 2, length, 4, seed=seed + 1)[0]
    q, k, v = inputs
    actual = combiner(q, k, v, key_mask, **options(form, segment_length))
    expected = attention_matrix(q, k, key_mask, **options(form, segment_length)) @ v
    assert_exact(actual.detach(), expected.detach(), "out")
    gradients = torch.autograd.grad((actual * weight).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for name, gradient, wanted in zip("qkv", gradients, expected_gradients, strict=True):
        assert_exact(gradient, torch.zeros_like(gradient) if wanted is None else wanted, f"d{name}")


@forms
@pytest.mark.parametrize("length", [1, 2, 31, 33, 64])
def test_agrees_with_the_oracle(form, length):
    assert_agrees(form, 8, length, None)


@forms
@pytest.mark.parametrize("kind", ["suffix", "scattered", "one", "empty"])
def test_agrees_with_the_oracle_under_padding(form, kind):
    assert_agrees(form, 5, 33, padding(2, 33, kind=kind, seed=3))


@forms
def test_agrees_with_the_oracle_on_a_longer_ragged_grid(form):
    assert_agrees(form, 16, 100, padding(2, 100, kind="scattered"))


@forms
def test_agrees_where_whole_spans_are_padding(form):
    key_mask = torch.ones(2, 32, dtype=torch.bool)
    key_mask[0, 8:24] = False
    key_mask[1, :13] = False
    assert_agrees(form, 4, 32, key_mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_oracle_partitions_the_support(pattern, causal):
    """Every visible position is in exactly one set of the definition itself."""
    for length in (1, 2, 3, 9, 17, 24):
        for i in range(length):
            direct, regions = partition(i, length, pattern, 5, False, causal)
            assert sorted([*direct, *(j for r in regions for j in r)]) == list(range(i + 1 if causal else length))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["suffix", "scattered"])
def test_constant_values_come_back(pattern, kind):
    q, k, _ = qkv(3, 2, 50, 8, scale=3.0)
    key_mask = padding(3, 50, kind=kind)
    constant = torch.arange(8, dtype=torch.float64).expand_as(q)
    for causal in (False, True):
        out = combiner(q, k, constant, key_mask, **options((pattern, causal, False)))
        assert_exact(out, constant * key_mask[:, None, :, None])


@pytest.mark.parametrize(
    ("pattern", "segment_length", "length"),
    [
        ("fixed", 40, 40),  # one segment
        ("fixed", 64, 40),
        ("fixed", 1, 40),  # segments of one token: a summary is the token
        ("logsparse", 64, 2),
        ("axial", 40, 40),  # one row
        ("axial", 1, 40),  # one column: a row is a token
        ("axial_vertical", 40, 40),
        ("axial_vertical", 1, 40),  # one column: direct
        ("axial_vertical", 20, 40),  # two rows: what is left of a column is one token
        ("axial_horizontal", 40, 40),
        ("axial_horizontal", 1, 40),
        ("axial_horizontal", 2, 40),  # two columns: what is left of a row is one token
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_softmax_where_every_region_is_one_token(pattern, segment_length, length, causal):
    q, k, v = qkv(2, 2, length, 8)
    key_mask = padding(2, length, kind="scattered")
    for mask in (None, key_mask):
        out = combiner(q, k, v, mask, **options((pattern, causal, False), segment_length))
        expected = softmax(q, k, v, mask, causal)
        if mask is not None:
            out, expected = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (out, expected))
        assert_exact(out, expected)


def test_equal_keys_give_the_mean_of_own_tokens_and_span_means():
    """With one key everywhere every logit is equal: 8 own tokens and 3 span means weigh 1/11 each."""
    q, k, v = qkv(1, 2, 32, 4)
    k = k[:, :, :1].expand_as(k)
    means = v.unflatten(2, (4, 8)).mean(3)  # (1, 2, 4, D)
    sums = 8 * means
    expected = ((sums + means.sum(2, keepdim=True) - means) / 11).repeat_interleave(8, 2)
    assert_exact(combiner(q, k, v, pattern="fixed", segment_length=8), expected)
    with_own = ((sums + means.sum(2, keepdim=True)) / 12).repeat_interleave(8, 2)
    assert_exact(combiner(q, k, v, pattern="fixed", segment_length=8, include_own_span=True), with_own)


def test_logsparse_sees_thirteen_as_eight_and_four_and_one():
    """Token 13 of a causal sequence with equal keys: means of [0, 8), [8, 12), token 12 and itself, 1/4 each."""
    q, k, v = qkv(1, 1, 14, 4)
    k = k[:, :, :1].expand_as(k)
    expected = (v[:, :, :8].mean(2) + v[:, :, 8:12].mean(2) + v[:, :, 12] + v[:, :, 13]) / 4
    assert_exact(combiner(q, k, v, pattern="logsparse", causal=True)[:, :, 13], expected)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [17, 33])
def test_the_future_never_changes_the_past(pattern, length):
    q, k, v = qkv(2, 2, length, 8)
    q2, k2, v2 = qkv(2, 2, length, 8, seed=9, scale=10.0)
    for now in (0, 4, 8, 15):
        past = torch.arange(length)[:, None] <= now
        mixed = [torch.where(past, a, b) for a, b in zip((q, k, v), (q2, k2, v2), strict=True)]
        before = combiner(q, k, v, **options((pattern, True, False)))
        after = combiner(*mixed, **options((pattern, True, False)))
        assert torch.equal(before[:, :, : now + 1], after[:, :, : now + 1])
        assert not torch.allclose(before[:, :, now + 1 :], after[:, :, now + 1 :])


@forms
def test_padding_holds_nothing_and_gets_nothing(form):
    q, k, v = qkv(2, 2, 40, 8)
    key_mask = padding(2, 40, kind="scattered")
    key_mask[0, 24:] = False
    padded = ~key_mask[:, None, :, None]
    clean = combiner(q, k, v, key_mask, **options(form))
    garbage = [x.masked_fill(padded, 1e30).requires_grad_() for x in (q, k, v)]
    dirty = combiner(*garbage, key_mask, **options(form))
    assert torch.equal(clean, dirty)
    assert (dirty * padded).eq(0).all()
    for gradient in torch.autograd.grad(dirty.square().sum(), garbage):
        assert gradient.isfinite().all()
        assert (gradient * padded).eq(0).all()


@forms
def test_padding_at_the_end_is_the_same_as_a_shorter_sequence(form):
    """Also from 31 to 100 tokens, where Logsparse's tree grows by two levels."""
    q, k, v = qkv(1, 2, 100, 8)
    key_mask = torch.arange(100)[None] < 31
    long = combiner(q, k, v, key_mask, **options(form))[:, :, :31]
    assert_exact(long, combiner(q[:, :, :31], k[:, :, :31], v[:, :, :31], **options(form)))


@forms
def test_no_real_token_gives_zeros_and_zero_gradients(form):
    inputs = qkv(2, 2, 20, 4, requires_grad=True)
    out = combiner(*inputs, torch.zeros(2, 20, dtype=torch.bool), **options(form))
    assert out.eq(0).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scale", [1e-3, 1e2])
def test_gradients_are_finite_at_every_scale(pattern, scale):
    inputs = qkv(2, 2, 40, 32, scale=scale, dtype=torch.float32, requires_grad=True)
    for causal in (False, True):
        out = combiner(*inputs, padding(2, 40, kind="empty"), **options((pattern, causal, False)))
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), inputs))


def test_ties_of_a_maximum_share_its_gradient():
    """Span 1 repeats one token: each copy carries the same part of the pooled key's gradient."""
    q, k, v = qkv(1, 1, 8, 4)
    k[:, :, 4:] = k[:, :, 4:5]
    q[:, :, 4:] = q[:, :, 4:5]
    k.requires_grad_()
    q.requires_grad_()
    out = combiner(q, k, torch.cat([v[:, :, :4], v[:, :, 4:5].expand(-1, -1, 4, -1)], 2), segment_length=4)
    dq, dk = torch.autograd.grad(out[:, :, :4].square().sum(), (q, k))
    assert dk[0, 0, 4].norm() > 1e-3
    for gradient in (dq, dk):
        assert_exact(gradient[:, :, 4:], gradient[:, :, 4:5].expand(-1, -1, 4, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_half_precision_is_computed_in_float32(pattern, dtype):
    q, k, v = qkv(2, 2, 40, 8, dtype=dtype)
    out = combiner(q, k, v, **options((pattern, False, False)))
    assert out.dtype == dtype
    wide = combiner(q.float(), k.float(), v.float(), **options((pattern, False, False)))
    assert torch.equal(out, wide.to(dtype))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"pattern": "axial_diagonal"}, r"attention\.pattern=axial_diagonal is unknown .*fixed, logsparse, axial"),
        ({"segment_length": 0}, r"attention\.segment_length=0 must be a positive integer"),
        ({"segment_length": 8.0}, r"attention\.segment_length=8\.0 must be a positive integer"),
        ({"include_own_span": "yes"}, r"attention\.include_own_span='yes' must be true or false"),
        ({"include_own_span": True, "causal": True}, r"attention\.include_own_span=True is refused with causal=True"),
        ({"include_own_span": True, "pattern": "logsparse"}, r"not defined for pattern=logsparse"),
        ({"include_own_span": True, "pattern": "axial_vertical"}, r"not defined for pattern=axial_vertical"),
        ({"impl": "cuda"}, r"attention\.impl=cuda is not available"),
    ],
)
def test_bad_options_end_in_one_line(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        combiner(*qkv(1, 1, 8, 4), **bad)
    assert "\n" not in str(error.value)
