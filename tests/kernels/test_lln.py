"""LLN's reference is what its definition says, and has the statistics that its authors' form has."""

import math

import pytest
import torch
from gradients import assert_same_gradients
from inputs import padding, qkv
from oracles import lln as oracle
from tolerance import assert_exact
from torch import Tensor

import attention
from kernels.lln import lln, spreads
from kernels.lln.moments import FITTED, PUBLISHED, match_moments, moment_constants, spread

HEADS, DIM = 2, 8
CASES = [(1, None), (2, "suffix"), (31, "scattered"), (33, "one"), (64, None), (100, "empty"), (100, "scattered")]
ALPHA, BETA = torch.tensor([1.7]).double(), torch.tensor([2.1]).double()


def full(mask: Tensor | None, q: Tensor) -> Tensor:
    return torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("diag", [False, True], ids=["lln", "lln_diag"])
@pytest.mark.parametrize(("length", "kind"), CASES)
def test_output_and_gradients_are_those_of_the_definition(length, kind, diag, causal):
    q, k, v = qkv(2, HEADS, length, DIM, requires_grad=True)
    key_mask = None if kind is None else padding(2, length, kind=kind)
    r, p = (x.requires_grad_() for x in torch.rand(2, HEADS, DIM, generator=torch.Generator().manual_seed(3)).double())
    mix = (r[:, None], p[:, None]) if diag else None  # broadcast over tokens

    out = lln(q, k, v, key_mask, alpha=ALPHA, beta=BETA, mix=mix, causal=causal)
    expected = oracle.lln(q, k, v, full(key_mask, q), ALPHA, BETA, (r, p) if diag else None, causal)

    assert_exact(out.detach(), expected.detach(), "out")
    leaves = {"q": q, "k": k, "v": v, **({"r": r, "p": p} if diag else {})}
    direction = qkv(2, HEADS, length, DIM, seed=7)[0]
    assert_same_gradients((out * direction).sum(), (expected * direction).sum(), leaves)


@pytest.mark.parametrize("diag", [False, True], ids=["lln", "lln_diag"])
def test_the_future_never_changes_the_past(diag):
    q, k, v = qkv(1, HEADS, 50, DIM)
    mix = (0.5, 0.5) if diag else None
    before = lln(q, k, v, alpha=ALPHA, beta=BETA, mix=mix, causal=True)
    for x in (q, k, v):
        x[:, :, 37:] = 5 * torch.randn_like(x[:, :, 37:])
    after = lln(q, k, v, alpha=ALPHA, beta=BETA, mix=mix, causal=True)
    assert torch.equal(before[:, :, :37], after[:, :, :37])
    assert not torch.equal(before[:, :, 37:], after[:, :, 37:])


def test_no_gradient_reaches_the_scales():
    q, k, v = qkv(1, HEADS, 5, DIM, requires_grad=True)
    alpha = ALPHA.clone().requires_grad_()
    lln(q, k, v, alpha=alpha, beta=BETA).sum().backward()
    assert alpha.grad is None


# --- what the formulas say


@pytest.mark.parametrize("causal", [False, True])
def test_adding_a_constant_to_a_query_or_trading_a_vector_between_keys_and_queries_changes_nothing(causal):
    q, k, v = qkv(2, HEADS, 40, DIM)
    row, vector = torch.randn(2, HEADS, 40, 1).double(), torch.randn(DIM).double()
    out = lln(q, k, v, alpha=ALPHA, beta=BETA, causal=causal)
    assert_exact(lln(q + row, k, v, alpha=ALPHA, beta=BETA, causal=causal), out, "q + constant")
    shifted = lln(q - vector * BETA / ALPHA, k + vector, v, alpha=ALPHA, beta=BETA, causal=causal)
    assert_exact(shifted, out, "k + c, q − (β/α) c")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mix", [None, (0.5, 0.5)], ids=["lln", "lln_diag"])
def test_constant_values_come_back(mix, causal):
    q, k, _ = qkv(2, HEADS, 40, DIM)
    constant = torch.arange(1.0, DIM + 1).double().expand_as(q)
    real = padding(2, 40, kind="scattered")
    out = lln(q, k, constant, real, alpha=ALPHA, beta=BETA, mix=mix, causal=causal)
    assert_exact(out, constant * real[:, None, :, None])


@pytest.mark.parametrize("length", [1, DIM - 1, DIM])
def test_diag_of_at_most_one_block_averages_with_softmax(length):
    q, k, v = qkv(2, HEADS, length, DIM)
    softmax = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(DIM), -1) @ v
    alone = lln(q, k, v, alpha=ALPHA, beta=BETA)
    assert_exact(lln(q, k, v, alpha=ALPHA, beta=BETA, mix=(0.5, 0.5)), (alone + softmax) / 2)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_inputs_of_three_sigma_stay_right_in_float32(causal):
    # At σ = 3, α = β = 5.5: exponents reach ±70, and exp(αq)·exp(βk) leaves the range of float32 both ways.
    q, k, v = qkv(1, HEADS, 256, 32, scale=3.0, dtype=torch.float32)
    alpha, beta = match_moments(*spreads(q, k, None), PUBLISHED)
    assert float(alpha) == pytest.approx(5.52, abs=0.1)
    out = lln(q, k, v, alpha=alpha, beta=beta, causal=causal)
    everything = torch.ones(1, 256, dtype=torch.bool)
    exact = oracle.lln(q.double(), k.double(), v.double(), everything, alpha.double(), beta.double(), causal=causal)
    # Rounding an exponent of size 70 to float32 costs 70 · 2⁻²⁴ of the weight: the only loss allowed here.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=float(v.abs().max()) * 2 * 140 * 2**-24)


# --- moment matching


def test_scales_are_those_of_the_authors_table():
    sigma = torch.tensor([0.25, 0.5, 0.577, 0.772, 1.0, 1.5, 2.0, 2.5, 3.0]).double()
    alpha, beta = match_moments(sigma, sigma, PUBLISHED)
    wanted = torch.tensor([4.40, 2.37, 2.17, 2.00, 2.14, 2.85, 3.71, 4.61, 5.52]).double()
    torch.testing.assert_close(alpha, wanted, rtol=0, atol=6e-3)  # the table has two decimals
    assert torch.equal(alpha, beta)


@pytest.mark.parametrize("kind", [None, "suffix", "scattered", "empty"])
def test_spread_is_the_unbiased_deviation_of_real_entries_only(kind):
    q, k, _ = qkv(3, HEADS, 20, DIM)
    mask = full(None if kind is None else padding(3, 20, kind=kind), q)
    q, k = 2 * q + 1, torch.where(mask[:, None, :, None], k, 1e30)
    alpha, beta = match_moments(*spreads(q, k, mask), PUBLISHED)
    wanted_alpha, wanted_beta = oracle.scales(q, k, mask, *PUBLISHED)
    assert_exact(alpha, wanted_alpha)
    assert_exact(beta, wanted_beta)


def test_spread_of_equal_or_missing_tokens_is_usable():
    x = torch.ones(1, 1, 4, DIM)
    assert spread(x, torch.ones(1, 4, dtype=torch.bool)).item() == pytest.approx(1e-4)
    assert spread(x, torch.zeros(1, 4, dtype=torch.bool)) == 1


@pytest.mark.parametrize("head_dim", [8, 24, 32, 40, 64, 80, 128])
def test_constants_of_a_head_dimension_predict_the_variance_of_a_log_normal_sum(head_dim):
    a, b = moment_constants("head_dim", head_dim)
    variance = 6.0
    x = math.sqrt(variance) * torch.randn(40_000, head_dim, generator=torch.Generator().manual_seed(0))
    assert float(x.logsumexp(-1).var()) == pytest.approx(a * variance + b, rel=0.04)


def test_constants_by_name():
    assert moment_constants("published", 32) == PUBLISHED == moment_constants("head_dim", 64)
    assert moment_constants("head_dim", 32) == FITTED[32]
    for head_dim in (4, 256):
        with pytest.raises(ValueError, match=f"attention.constants=head_dim .* got head_dim={head_dim}"):
            moment_constants("head_dim", head_dim)


# --- the table of the paper's instruments, research note B4

TABLE = {  # (D, σ): α, then var ln P, entropy in bits, spectral gap of LLN; N = 256, mean of three draws
    (64, 0.5): (2.370, 0.102, 7.912, 0.979),
    (64, 1.0): (2.135, 0.906, 6.817, 0.853),
    (64, 1.5): (2.847, 6.789, 3.073, 0.468),
    (64, 2.0): (3.710, 23.59, 1.457, 0.259),
    (32, 1.0): (2.135, 1.141, 6.677, 0.825),
    (32, 1.5): (2.847, 7.671, 3.089, 0.501),
}
UNSCALED = {  # the same with α = β = 1
    (64, 1.0): (0.055, 7.955, 0.987),
    (32, 1.5): (0.380, 7.608, 0.940),
}
DRAWS, TABLE_DRAWS, LENGTH = 5, 3, 256


def both_weights(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
    """P of the module, by reading the identity as values, D columns a head; P of the definition; and its α."""
    dim = q.shape[-1]
    heads = LENGTH // dim
    columns = torch.eye(LENGTH).double().unflatten(1, (heads, dim)).transpose(0, 1)[None]  # (1, H, N, D)
    q, k = (x.expand(1, heads, LENGTH, dim) for x in (q, k))
    out = attention.build("lln", num_heads=heads, head_dim=dim, max_length=LENGTH)(q, k, columns)
    alpha, beta = oracle.scales(q, k, full(None, q), *PUBLISHED)
    return out[0].transpose(0, 1).flatten(1), oracle.lln_weights(q[0, 0], k[0, 0], alpha, beta), float(alpha)


def instruments(weights: Tensor) -> Tensor:
    """var ln P, entropy in bits, spectral gap."""
    entropy = -(weights * weights.log2()).sum(-1).mean()
    moduli = torch.linalg.eigvals(weights).abs().sort(descending=True).values
    return torch.stack((weights.log().var(), entropy, 1 - moduli[1]))


def assert_within_spread(measured: list[Tensor], published: tuple[float, ...]) -> None:
    """Means of two sets of draws agree within three standard errors, and half a unit of the table's last digit."""
    draws = torch.stack(measured)
    error = draws.std(0) * math.sqrt(1 / len(draws) + 1 / TABLE_DRAWS)
    digits = torch.tensor([0.005 if published[0] > 10 else 0.0005, 0.0005, 0.0005])
    difference = (draws.mean(0) - torch.tensor(published)).abs()
    assert (difference <= 3 * error + digits).all(), f"{draws.mean(0)} ± {error} against {published}"


@pytest.mark.parametrize(("dim", "sigma"), TABLE)
def test_attention_matrix_has_the_published_moments(dim, sigma):
    alpha_wanted, *wanted = TABLE[dim, sigma]
    measured = []
    for seed in range(DRAWS):
        q, k, _ = qkv(1, 1, LENGTH, dim, scale=sigma, seed=seed)
        weights, defined, alpha = both_weights(q, k)
        assert alpha == pytest.approx(alpha_wanted, rel=0.02)
        assert_exact(weights, defined, "P")
        measured.append(instruments(weights))
    assert_within_spread(measured, tuple(wanted))


@pytest.mark.parametrize(("dim", "sigma"), UNSCALED)
def test_without_scales_the_attention_matrix_stays_flat(dim, sigma):
    measured, one = [], torch.ones(1).double()
    for seed in range(DRAWS):
        q, k, _ = qkv(1, 1, LENGTH, dim, scale=sigma, seed=seed)
        measured.append(instruments(oracle.lln_weights(q[0, 0], k[0, 0], one, one)))
    assert_within_spread(measured, UNSCALED[dim, sigma])
