"""AdaMRA-R's reference is what its definition says, for every switch, mask and length."""

import pytest
import torch
from gradients import assert_same_gradients
from inputs import padding, qkv
from oracles import adamra as oracle
from tolerance import assert_exact
from torch import Tensor

from kernels.adamra import COMPRESSIONS, FEATURE_MAPS, GATES, adamra, reference, shares
from kernels.lln import lln

RATES = (2, 3, 8)
HEADS, DIM = 2, 4
CASES = [(1, None), (2, "suffix"), (31, "scattered"), (33, "one"), (64, None), (100, "empty")]
VARIANTS = [
    *(dict(feature_map=f, compress="mean", gate="top1") for f in FEATURE_MAPS),
    *(dict(feature_map="exponential", compress=c, gate="top1") for c in COMPRESSIONS[1:]),
    *(dict(feature_map="exponential", compress="mean", gate=g) for g in GATES[1:]),
    dict(feature_map="elu", compress="conv", gate="soft"),
]


def parameters(compress: str, gate: str, seed: int = 1) -> tuple[Tensor | None, list, list]:
    """Router, key weights and value weights, random, so that nothing hides behind an initial value."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def weights() -> list:
        if compress == "mean":
            return [None] * len(RATES)
        return [draw(HEADS, rate, *(DIM,) * (1 if compress == "dwconv" else 2)) for rate in RATES]

    return None if gate == "fixed" else draw(HEADS, len(RATES), DIM), weights(), weights()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize(("length", "kind"), CASES)
def test_output_loss_choice_and_gradients_are_those_of_the_definition(length, kind, variant):
    q, k, v = qkv(2, HEADS, length, DIM, requires_grad=True)
    key_mask = None if kind is None else padding(2, length, kind=kind)
    full_mask = torch.ones(2, length, dtype=torch.bool) if key_mask is None else key_mask
    router, key_weights, value_weights = parameters(variant["compress"], variant["gate"])
    scales = torch.tensor([1.5, 1.0, 0.7]).double(), torch.tensor([0.8, 1.2, 1.9]).double()
    arguments = dict(router=router, rates=RATES, key_weights=key_weights, value_weights=value_weights)
    arguments |= dict(feature_map=variant["feature_map"], gate=variant["gate"])

    used_scales = scales if variant["feature_map"] == "exponential" else None
    out, balance = adamra(q, k, v, key_mask, scales=used_scales, **arguments)
    expected, expected_balance, chosen = oracle.adamra(q, k, v, full_mask, scales=scales, **arguments)

    if router is not None:
        _, one_hot = reference.route(q, router)
        assert (one_hot.sum(-1) == 1).all()
        assert all(one_hot[index].int().argmax() == r for index, r in chosen.items())
    assert_exact(out.detach(), expected.detach(), "out")
    assert_exact(balance.detach(), expected_balance.detach(), "balance")

    leaves = {"q": q, "k": k, "v": v, "router": router}
    leaves |= {f"key_weights[{r}]": w for r, w in enumerate(key_weights)}
    leaves |= {f"value_weights[{r}]": w for r, w in enumerate(value_weights)}
    leaves = {name: x for name, x in leaves.items() if x is not None}
    direction = qkv(2, HEADS, length, DIM, seed=7)[0]
    losses = ((o * direction).sum() + 3 * b for o, b in ((out, balance), (expected, expected_balance)))
    assert_same_gradients(*losses, leaves)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_exponential_map_without_scales_is_refused_in_one_line(impl):
    q, k, v = qkv(1, HEADS, 5, DIM)
    with pytest.raises(ValueError, match=r"^attention\.feature_map=exponential needs scales: .+$"):
        adamra(q, k, v, router=None, rates=(2,), key_weights=[None], value_weights=[None], gate="fixed", impl=impl)


def test_equal_logits_choose_the_first_resolution():
    q, _, _ = qkv(1, HEADS, 5, DIM)
    assert shares(q, None, torch.zeros(HEADS, 3, DIM).double()).tolist() == [[1, 0, 0]] * HEADS
    router = torch.zeros(HEADS, 3, DIM).double()
    router[:, 1:, 0] = q[0, 0, 0, 0].sign()  # resolutions 1 and 2 tie above 0
    _, one_hot = reference.route(q[:, :, :1], router)
    assert one_hot[0, 0, 0].tolist() == [False, True, False]


@pytest.mark.parametrize("kind", ["suffix", "scattered", "one"])
@pytest.mark.parametrize("compress", ["dwconv", "conv"])
def test_learned_compression_with_weights_1_over_c_is_the_mean_under_every_mask(compress, kind):
    x, real = qkv(3, HEADS, 21, DIM)[0], padding(3, 21, kind=kind)
    x = x * real[:, None, :, None]
    one = torch.ones(DIM) if compress == "dwconv" else torch.eye(DIM)
    for rate in (1, 4, 64):
        weight = (one / rate).double().expand(HEADS, rate, *one.shape)
        mean, kept = reference.compress(x, real, rate, None)
        learned, _ = reference.compress(x, real, rate, weight)
        assert mean.shape[2] == -(-21 // rate)
        assert_exact(learned, mean, f"rate {rate}")
        assert torch.equal(mean[~kept[:, None].expand(3, HEADS, -1)], torch.zeros(HEADS * int((~kept).sum()), DIM))


def test_a_window_longer_than_the_sequence_is_its_mean():
    q, k, v = qkv(2, HEADS, 9, DIM)
    real = padding(2, 9)
    out, _ = adamra(
        q, k, v, real, router=None, rates=(64,), key_weights=[None], value_weights=[None], gate="fixed",
        scales=(torch.ones(1), torch.ones(1)),
    )  # fmt: skip
    for b in range(2):
        mean = v[b, :, real[b]].mean(1, keepdim=True)
        assert_exact(out[b, :, real[b]], mean.expand(-1, int(real[b].sum()), -1))


def test_one_resolution_of_single_tokens_is_lln():
    q, k, v = qkv(2, HEADS, 33, DIM)
    real = padding(2, 33, kind="scattered")
    alpha, beta = torch.tensor([1.7]).double(), torch.tensor([2.1]).double()
    out, balance = adamra(
        q, k, v, real, router=None, rates=(1,), key_weights=[None], value_weights=[None], gate="fixed",
        scales=(alpha, beta),
    )  # fmt: skip
    assert_exact(out, lln(q, k, v, real, alpha=alpha, beta=beta))
    assert balance == 0


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_constant_values_come_back_times_the_gate(feature_map):
    q, k, _ = qkv(2, HEADS, 50, DIM)
    v = torch.full_like(q, 3.0)
    router, none = parameters("mean", "top1")[0], [None] * len(RATES)
    scales = (torch.ones(3), torch.ones(3))
    out, _ = adamra(
        q, k, v, None, router=router, rates=RATES, key_weights=none, value_weights=none, feature_map=feature_map,
        scales=scales, gate="top1",
    )  # fmt: skip
    gates = (q @ router.transpose(-2, -1)).softmax(-1).amax(-1, keepdim=True)
    tolerance = 1e-6 if feature_map == "elu" else 1e-12  # elu keeps an eps of 1e-6 in its normaliser
    torch.testing.assert_close(out, (3.0 * gates).expand_as(out), rtol=tolerance, atol=0)


def test_balance_loss_is_one_for_even_use_and_r_for_a_single_resolution():
    real = torch.ones(1, 6, dtype=torch.bool)
    even = torch.eye(3).repeat(2, 1)[None, None]  # (1, 1, 6, 3)
    alone = torch.eye(3)[:1].expand(6, 3)[None, None]
    assert reference.balance_loss(even, even.bool(), real) == pytest.approx(1.0)
    assert reference.balance_loss(alone, alone.bool(), real) == pytest.approx(3.0)
