"""The AdaMRA module: its options, its parameters, its loss, and whose statistics its scales rest on."""

import pytest
import torch
from gradients import assert_same_gradients
from inputs import padding, qkv
from oracles import adamra as oracle
from tolerance import assert_exact

import attention
from attention.adamra import AdaMRA
from kernels.adamra import COMPRESSIONS, GATES
from kernels.lln.moments import PUBLISHED, match_moments

HEADS, DIM, LENGTH, RATES = 2, 4, 21, (2, 5)


def build(**options) -> AdaMRA:
    options = {"rates": RATES, **options}
    module = attention.build("adamra", num_heads=HEADS, head_dim=DIM, max_length=128, **options).double()
    assert isinstance(module, AdaMRA)
    return module


@pytest.mark.parametrize(
    ("compress", "gate", "kind"),
    [("mean", "top1", "scattered"), ("dwconv", "top1", "suffix"), ("conv", "soft", "empty"), ("mean", "fixed", "one")],
)
def test_module_and_parameter_gradients_are_those_of_the_definition(compress, gate, kind):
    module = build(compress=compress, gate=gate, balance_weight=0.3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    q, k, v = qkv(3, HEADS, LENGTH, DIM, requires_grad=True)
    mask = padding(3, LENGTH, kind=kind)
    none = [None] * len(RATES)
    key_weights, value_weights = (none if w is None else list(w) for w in (module.key_weights, module.value_weights))

    out = module(q, k, v, mask)
    sigma_query, sigma_key = oracle.spreads(q.detach(), k.detach(), mask, RATES, key_weights)
    scales = match_moments(*(torch.tensor(x, dtype=torch.float64) for x in (sigma_query, sigma_key)), PUBLISHED)
    expected, balance, _ = oracle.adamra(
        q, k, v, mask, router=module.router, rates=RATES, key_weights=key_weights, value_weights=value_weights,
        scales=scales, feature_map="exponential", gate=gate,
    )  # fmt: skip

    assert_exact(out.detach(), expected.detach(), "out")
    assert_exact(module.auxiliary_loss().detach(), 0.3 * balance.detach(), "auxiliary loss")
    direction = qkv(3, HEADS, LENGTH, DIM, seed=7)[0]
    losses = ((out * direction).sum() + module.auxiliary_loss(), (expected * direction).sum() + 0.3 * balance)
    assert_same_gradients(*losses, {"q": q, "k": k, "v": v, **dict(module.named_parameters())})


def test_learned_compressions_start_as_the_mean():
    q, k, v = qkv(2, HEADS, LENGTH, DIM)
    mask = padding(2, LENGTH, kind="scattered")
    mean, *learned = (build(compress=compress, rates=(1, 4, 32)) for compress in COMPRESSIONS)  # 1/c is exact
    for module in learned:
        module.router = mean.router
        assert_exact(module(q, k, v, mask).detach(), mean(q, k, v, mask).detach(), module.compress)


def test_the_router_starts_near_even_and_fixed_heads_have_none():
    torch.manual_seed(0)
    router = attention.build("adamra", num_heads=8, head_dim=64, max_length=8).router
    assert router.shape == (8, 3, 64)
    assert float(router.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert build(gate="fixed").router is None


def test_fixed_heads_take_the_resolutions_in_turn():
    q, k, v = qkv(2, HEADS, LENGTH, DIM)
    fixed = build(gate="fixed", feature_map="softmax")
    out = fixed(q, k, v)
    for h, rate in enumerate(RATES):
        alone = build(gate="fixed", feature_map="softmax", rates=[rate])
        assert_exact(out[:, h], alone(q, k, v)[:, h])
    assert fixed.shares(q).tolist() == [[1, 0], [0, 1]]
    assert fixed.auxiliary_loss() == 0


def test_an_unchosen_resolution_learns_nothing_and_its_share_is_zero():
    q, k, v = qkv(2, HEADS, LENGTH, DIM)
    q[..., 0] = 1.0
    module = build(compress="dwconv")
    with torch.no_grad():
        module.router.zero_()
        module.router[:, 1, 0] = 50.0
    module(q, k, v).sum().backward()
    assert module.shares(q).tolist() == [[0, 1]] * HEADS
    for weights in (module.key_weights, module.value_weights):
        assert not weights[0].grad.any()
        assert weights[1].grad.any()


@pytest.mark.parametrize("gate", GATES)
def test_shares_are_of_real_queries_only(gate):
    q, mask = qkv(2, HEADS, LENGTH, DIM)[0], padding(2, LENGTH, kind="scattered")
    module = build(gate=gate)
    shares = module.shares(torch.where(mask[:, None, :, None], q, 1e9), mask)
    torch.testing.assert_close(shares.sum(-1), torch.ones(HEADS), check_dtype=False)
    assert torch.equal(shares, module.shares(torch.where(mask[:, None, :, None], q, -1e9), mask))


@pytest.mark.parametrize("statistics", ["running", "frozen"])
def test_stored_statistics_are_per_resolution_and_free_evaluation_of_batch_mates(statistics):
    q, k, v = qkv(2, HEADS, LENGTH, DIM)
    q[1], k[1] = 3 * q[1], 3 * k[1]
    mask = padding(2, LENGTH)
    module = build(statistics=statistics)
    module(q, k, v, mask)
    sigma_query, sigma_key = oracle.spreads(q, k, mask, RATES, [None, None])
    assert module.moments.sigma_query.tolist() == pytest.approx([sigma_query] * 2, rel=1e-6)
    assert module.moments.sigma_key.tolist() == pytest.approx(sigma_key, rel=1e-6)
    assert sigma_key[1] < sigma_key[0]  # the longer the window, the narrower its mean
    module.eval()
    out = module(q, k, v, mask)
    assert_exact(out[:1].detach(), module(q[:1], k[:1], v[:1], mask[:1]).detach())
    batch = build()
    batch.router = module.router
    assert_exact(out.detach(), batch(q, k, v, mask).detach(), "the stored σ are those of this call")


def test_a_call_without_any_real_token_is_zero_and_has_no_loss():
    q, k, v = qkv(2, HEADS, LENGTH, DIM, requires_grad=True)
    module = build(compress="conv")
    out = module(q, k, v, torch.zeros(2, LENGTH, dtype=torch.bool))
    (out.sum() + module.auxiliary_loss()).backward()
    assert module.auxiliary_loss() == 0
    for zero in (out, q.grad, k.grad, v.grad, *(parameter.grad for parameter in module.parameters())):
        assert not zero.any()


def test_release_forgets_the_loss_of_the_last_call_and_its_graph():
    module = build()
    module(*qkv(2, HEADS, LENGTH, DIM))
    assert module.auxiliary_loss().requires_grad
    module.release()
    assert module.auxiliary_loss() == 0
    assert not module.auxiliary_loss().requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rates=()), r"attention.rates=\(\) must be a list of positive integers"),
        (dict(rates=8), "attention.rates=8 must be a list of positive integers"),
        (dict(rates=[2, 0]), r"attention.rates\[1\]=0 must be a positive integer"),
        (dict(feature_map="relu"), "attention.feature_map=relu must be one of exponential, elu, softmax"),
        (dict(compress="max"), "attention.compress=max must be one of mean, dwconv, conv"),
        (dict(gate="top2"), "attention.gate=top2 must be one of top1, top1_unscaled, soft, fixed"),
        (dict(balance_weight=-1), "attention.balance_weight=-1 must be a finite number >= 0"),
        (dict(balance_weight="x"), "attention.balance_weight='x' must be a finite number >= 0"),
        (dict(statistics="ema"), "attention.statistics=ema must be one of batch, running, frozen"),
        (dict(causal=True), "attention.causal=True is refused by adamra: a fused window would leak"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        build(**options)
    assert "\n" not in str(error.value)
