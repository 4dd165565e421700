"""The instruments: known matrices, matrices of known attentions, the published shape of the curves."""

import math
from itertools import pairwise

import pytest
import torch
from inputs import padding, qkv
from torch import Tensor

import attention
from attention import Attention
from lra.lens import measures
from lra.lens.matrix import attention_matrix
from lra.lens.measurement import INSTRUMENTS, measure, measure_matrix
from lra.lens.sweep import gaussian_qkv, sweep

N = 64
UNIFORM = torch.full((N, N), 1 / N, dtype=torch.float64)
PERMUTATION = torch.eye(N, dtype=torch.float64).roll(1, 0)
ONE_COLUMN = torch.zeros(N, N, dtype=torch.float64)
ONE_COLUMN[:, 5] = 1


def build(name: str, heads: int = 2, dim: int = 8, length: int = 256, **options) -> Attention:
    torch.manual_seed(0)
    return attention.build(name, num_heads=heads, head_dim=dim, max_length=length, **options)


def explicit_softmax(q: Tensor, k: Tensor, key_mask: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).div(math.sqrt(q.shape[-1])).exp() * key_mask[:, None, None, :]
    return weights / weights.sum(-1, keepdim=True) * key_mask[:, None, :, None]


# What known matrices show


@pytest.mark.parametrize(
    ("matrix", "entropy", "gap", "bias"),
    [
        pytest.param(UNIFORM, math.log2(N), 1.0, 0.0, id="uniform"),
        pytest.param(PERMUTATION, 0.0, 0.0, 0.0, id="permutation"),
        pytest.param(ONE_COLUMN, 0.0, 1.0, math.sqrt(N - 1), id="one column"),
        pytest.param((UNIFORM + PERMUTATION) / 2, None, 0.5, 0.0, id="half of each"),
    ],
)
def test_known_matrices(matrix: Tensor, entropy: float | None, gap: float, bias: float):
    if entropy is not None:
        assert float(measures.entropy(matrix)) == pytest.approx(entropy, abs=1e-12)
        assert float(measures.normalised_entropy(matrix)) == pytest.approx(entropy / math.log2(N), abs=1e-12)
    assert float(measures.spectral_gap(matrix)) == pytest.approx(gap, abs=1e-9)
    assert float(measures.column_bias(matrix)) == pytest.approx(bias, abs=1e-9)


def test_entropy_of_a_two_point_row():
    matrix = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    expected = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)) / 2
    assert float(measures.entropy(matrix)) == pytest.approx(expected, abs=1e-15)


def test_gap_of_two_closed_groups_is_zero_although_entropy_is_high():
    """Two groups that never look at each other keep the eigenvalue 1 twice."""
    matrix = torch.block_diag(*[torch.full((N // 2, N // 2), 2 / N, dtype=torch.float64)] * 2)
    assert float(measures.spectral_gap(matrix)) == pytest.approx(0, abs=1e-12)
    assert float(measures.entropy(matrix)) == pytest.approx(math.log2(N) - 1)


@pytest.mark.parametrize("matrix_of", ["random", "permutation"])
def test_arnoldi_iteration_finds_the_gap_of_all_eigenvalues(monkeypatch: pytest.MonkeyPatch, matrix_of: str):
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(N, N, generator=generator, dtype=torch.float64) ** 8
    matrix = PERMUTATION if matrix_of == "permutation" else random
    dense = measures.spectral_gap(matrix)
    monkeypatch.setattr(measures, "DENSE_EIGENVALUES", 1)
    torch.testing.assert_close(measures.spectral_gap(matrix), dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [0, 1, 5])
def test_required_span_of_a_band_is_its_mean_distance(width: int):
    places = range(N)
    matrix = torch.tensor([[float(abs(i - j) <= width) for j in places] for i in places], dtype=torch.float64)
    rows = [[abs(i - j) for j in places if abs(i - j) <= width] for i in places]
    expected = sum(sum(row) / len(row) for row in rows) / N
    assert float(measures.required_span(matrix)) == pytest.approx(expected, abs=1e-12)
    assert float(measures.required_span(matrix, 3 * torch.arange(N))) == pytest.approx(3 * expected, abs=1e-12)


def test_log_normal_weights_are_recognised_and_others_are_not():
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(1000, 1000, generator=generator, dtype=torch.float64)
    normal = measures.log_normality(torch.softmax(logs, -1))
    assert float(normal.distance) < 0.01
    assert float(normal.variance) == pytest.approx(1, abs=0.02)
    assert float(normal.mean) == pytest.approx(-math.log(1000) - 0.5, abs=0.02)
    assert abs(float(normal.skewness)) < 0.02
    assert abs(float(normal.excess_kurtosis)) < 0.02

    uniform = torch.rand(1000, 1000, generator=generator, dtype=torch.float64)
    exponential = measures.log_normality(torch.softmax((-uniform.log()).log(), -1))  # ln of exponential weights
    assert float(exponential.distance) > 0.05
    assert float(exponential.skewness) == pytest.approx(-1.14, abs=0.05)  # of the Gumbel distribution
    assert float(exponential.excess_kurtosis) == pytest.approx(2.4, abs=0.2)


def test_ks_distance_is_the_largest_step_away_from_the_normal():
    matrix = torch.softmax(3 * torch.rand(20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1)
    logs = sorted(matrix.log().flatten().tolist())
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / len(logs))
    normal = [(1 + math.erf((x - mean) / spread / math.sqrt(2))) / 2 for x in logs]
    expected = max(max(f - at / len(logs), (at + 1) / len(logs) - f) for at, f in enumerate(normal))
    assert float(measures.log_normality(matrix).distance) == pytest.approx(expected, abs=1e-12)


def test_temperature_is_one_over_the_spread_of_the_logits():
    q, k, _ = qkv(1, 2, 200, 16, scale=1.5)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / 4
    expected = 1 / logits.flatten(2).std(-1)
    torch.testing.assert_close(measures.softmax_temperature(q, k), expected)
    torch.testing.assert_close(expected, torch.full_like(expected, 1 / 1.5**2), rtol=0.05, atol=0)
    assert float(measures.temperature(UNIFORM)) == math.inf


def test_scaled_and_empty_rows_do_not_change_what_the_others_show():
    """AdaMRA's gate scales rows, Routing leaves rows at zero: neither is concentration."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.softmax(torch.randn(N, N, generator=generator, dtype=torch.float64), -1)
    gated = matrix * torch.rand(N, 1, generator=generator, dtype=torch.float64)
    plain, scaled = measure_matrix(matrix), measure_matrix(gated)
    assert float(scaled["row_sum"]) == pytest.approx(float(gated.sum() / N))
    for name in set(plain) - {"row_sum"}:
        torch.testing.assert_close(scaled[name], plain[name], msg=name)

    half = matrix.clone()
    half[N // 2 :] = 0
    torch.testing.assert_close(measures.entropy(half), measures.entropy(matrix[: N // 2]))
    assert float(measure_matrix(half)["empty_rows"]) == 0.5


def test_negative_weights_have_no_entropy():
    matrix = UNIFORM.clone()
    matrix[0, 0] = -0.5
    shown = measure_matrix(matrix)
    assert float(shown["negative_share"]) == pytest.approx(0.5 / (0.5 + (N * N - 1) / N))
    assert math.isnan(shown["entropy"])
    assert math.isnan(shown["spectral_gap"])
    assert math.isnan(shown["required_span"])


def test_one_token_has_neither_gap_nor_normalised_entropy():
    shown = measure_matrix(torch.ones(1, 1, dtype=torch.float64))
    assert math.isnan(shown["spectral_gap"])
    assert math.isnan(shown["normalised_entropy"])
    assert float(shown["entropy"]) == 0


def test_a_stack_of_matrices_is_measured_one_by_one():
    stack = torch.stack([UNIFORM, PERMUTATION, ONE_COLUMN]).reshape(3, 1, N, N)
    for name, value in measure_matrix(stack).items():
        assert value.shape == (3, 1), name
        for at in range(3):
            single = measure_matrix(stack[at, 0])[name]
            torch.testing.assert_close(value[at, 0], single, equal_nan=True, atol=1e-9, rtol=0, msg=name)


# The matrix of an attention


@pytest.mark.parametrize("kind", ["suffix", "scattered"])
def test_the_matrix_of_softmax_is_the_explicit_one(kind: str):
    q, k, _ = qkv(2, 2, 45, 8)
    key_mask = padding(2, 45, kind=kind)
    expected = explicit_softmax(q, k, key_mask)
    torch.testing.assert_close(attention_matrix(build("softmax"), q, k, key_mask), expected, rtol=1e-10, atol=1e-14)


def test_the_matrix_of_no_attention_is_the_identity():
    q, k, _ = qkv(1, 2, 19, 8)
    assert torch.equal(attention_matrix(build("none"), q, k), torch.eye(19, dtype=torch.float64).expand(1, 2, 19, 19))


@pytest.mark.parametrize("name", attention.names())
def test_every_attention_is_its_matrix_times_the_values(name: str):
    """`attention_matrix` checks P v against the module itself, so it is enough that it does not refuse."""
    q, k, v = (x.float() for x in qkv(2, 2, 96, 8))
    key_mask = padding(2, 96, kind="scattered")
    module = build(name, length=96)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    values, matrix = measure(module, q, k, v, key_mask)
    assert set(INSTRUMENTS) <= set(values)
    assert matrix.dtype == torch.float64
    assert not matrix.masked_select(~key_mask[:, None, None, :]).any()
    assert not matrix.masked_select(~key_mask[:, None, :, None]).any()
    assert module.training
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


class SquaredValues(Attention):
    def attend(self, q, k, v, key_mask):
        return v**2


class ChannelWeights(Attention):
    def attend(self, q, k, v, key_mask):
        return v * torch.arange(self.head_dim)


class ShiftedValues(Attention):
    def attend(self, q, k, v, key_mask):
        return v + 1


@pytest.mark.parametrize("cls", [SquaredValues, ChannelWeights, ShiftedValues])
def test_what_has_no_single_matrix_is_refused_in_one_line(cls: type[Attention]):
    q, k, _ = qkv(1, 2, 19, 8)
    with pytest.raises(ValueError, match=rf"^{cls.__name__} has no attention matrix: [^\n]*$"):
        attention_matrix(cls(num_heads=2, head_dim=8, max_length=32), q, k)


class KeepsItsGraph(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def attend(self, q, k, v, key_mask):
        self._auxiliary = self.weight * 2
        return self.weight * v


def test_a_module_in_the_middle_of_training_can_be_measured():
    module = KeepsItsGraph(num_heads=2, head_dim=8, max_length=32)
    q, k, v = (x.float() for x in qkv(1, 2, 19, 8))
    module(q, k, v)
    assert torch.equal(attention_matrix(module, q, k)[0, 0], torch.eye(19, dtype=torch.float64))
    module.auxiliary_loss().backward()
    assert module.weight.grad == 2


# One call, all instruments


def test_measure_of_softmax_is_exact_and_padding_does_not_show():
    q, k, v = qkv(2, 2, 40, 8)
    key_mask = padding(2, 40, kind="empty")
    key_mask[0] = torch.arange(40) < 30
    padded, _ = measure(build("softmax"), q, k, v, key_mask)
    short, _ = measure(build("softmax"), *(x[:1, :, :30] for x in (q, k, v)))
    assert padded["relative_error"] == pytest.approx(0, abs=1e-14)
    assert padded["row_sum"] == pytest.approx(1)
    assert padded == pytest.approx(short)


def test_distances_in_a_span_are_those_of_the_sequence_padding_included():
    q, k, v = qkv(1, 1, 9, 8)
    key_mask = torch.tensor([[True, False, False, False, False, False, False, False, True]])
    values, matrix = measure(build("softmax", heads=1), q, k, v, key_mask)
    assert values["required_span"] == pytest.approx(float(8 * (matrix[0, 0, 0, 8] + matrix[0, 0, 8, 0]) / 2))


def test_no_real_token_gives_nan_everywhere():
    q, k, v = qkv(1, 2, 9, 8)
    values, _ = measure(build("softmax"), q, k, v, torch.zeros(1, 9, dtype=torch.bool))
    assert all(math.isnan(value) for value in values.values())


def test_error_of_passing_v_through_is_that_of_the_identity():
    q, k, v = qkv(1, 1, 30, 8)
    exact = explicit_softmax(q, k, torch.ones(1, 30, dtype=torch.bool)) @ v
    values, _ = measure(build("none", heads=1), q, k, v)
    assert values["relative_error"] == pytest.approx(float((v - exact).norm() / exact.norm()))


# Concentration against temperature

PUBLISHED = {  # (D, σ): attention: (var ln P, entropy in bits, spectral gap), N = 256, measured apart from this code
    (64, 0.5): {"softmax": (0.063, 7.955, 0.982), "linear": (0.003, 7.998, 0.999), "lln": (0.102, 7.912, 0.979)},
    (64, 1.0): {"softmax": (1.011, 7.294, 0.915), "linear": (0.011, 7.992, 0.996), "lln": (0.906, 6.817, 0.853)},
    (64, 1.5): {"softmax": (5.269, 5.011, 0.667), "linear": (0.021, 7.985, 0.994), "lln": (6.789, 3.073, 0.468)},
    (64, 2.0): {"softmax": (18.03, 2.690, 0.427), "linear": (0.029, 7.980, 0.992), "lln": (23.59, 1.457, 0.259)},
    (32, 1.0): {"softmax": (1.017, 7.289, 0.908), "linear": (0.020, 7.986, 0.995), "lln": (1.141, 6.677, 0.825)},
    (32, 1.5): {"softmax": (5.476, 5.048, 0.669), "linear": (0.041, 7.971, 0.991), "lln": (7.671, 3.089, 0.501)},
}
DRAWS = 8


@pytest.mark.parametrize("name", ["softmax", "linear", "lln"])
@pytest.mark.parametrize(("dim", "scale"), PUBLISHED)
def test_concentration_is_the_published_one_within_its_spread(name: str, dim: int, scale: float):
    """The published means of 3 draws and ours of 8 differ by at most 4 standard errors and the last digit."""
    q, k, _ = gaussian_qkv(1, DRAWS, 256, dim, scale=scale)
    matrix = attention_matrix(build(name, heads=DRAWS, dim=dim), q, k)
    shown = {
        "var ln P": measures.log_normality(matrix).variance,
        "entropy": measures.entropy(matrix),
        "spectral gap": measures.spectral_gap(matrix),
    }
    for (what, draws), expected in zip(shown.items(), PUBLISHED[dim, scale][name], strict=True):
        last_digit = 5e-3 if expected > 10 else 5e-4
        allowed = 4 * float(draws.std()) * math.sqrt(1 / 3 + 1 / DRAWS) + last_digit
        assert abs(float(draws.mean()) - expected) <= allowed, f"{what} is {float(draws.mean()):.4f}, not {expected}"


def test_softmax_concentrates_as_it_cools_and_the_weights_stay_log_normal():
    """Entropy grows with temperature, variance falls, and ln P is normal: the three claims of the LLN paper."""
    softmax = build("softmax", heads=1, dim=64)
    points = sweep(softmax, *gaussian_qkv(1, 1, 128, 64), scales=(0.5, 0.75, 1.0, 1.25))
    for warmer, cooler in pairwise(points):
        assert cooler["softmax_temperature"] == pytest.approx(cooler["scale"] ** -2, rel=0.05)
        assert cooler["entropy"] < warmer["entropy"]
        assert cooler["spectral_gap"] < warmer["spectral_gap"]
        assert cooler["log_variance"] > warmer["log_variance"]
    q, k, v = gaussian_qkv(1, 1, 256, 64)
    values, _ = measure(softmax, q, k, v)
    assert values["log_normality"] < 0.01
    assert values["log_mean"] == pytest.approx(-math.log(256) - values["log_variance"] / 2, abs=0.05)
    assert values["moment_match_error"] == pytest.approx(0, abs=0.1)


def test_gaussian_draws_are_one_draw_at_every_scale():
    q, k, v = gaussian_qkv(1, 2, 10, 8, seed=3)
    scaled_q, scaled_k, same_v = gaussian_qkv(1, 2, 10, 8, scale=2.5, seed=3)
    assert torch.equal(scaled_q, 2.5 * q)
    assert torch.equal(scaled_k, 2.5 * k)
    assert torch.equal(same_v, v)


def test_low_rank_form_has_the_gap_of_the_whole_matrix():
    """P = A Bᵀ with A = softmax_l(α q + λ), B = softmax_j(β k), here written out for LLN at α = 2, β = 1.5."""
    q, k, _ = gaussian_qkv(2, 1, 100, 8)
    left = torch.softmax(2 * q + torch.logsumexp(1.5 * k, -2, keepdim=True), -1)
    right = torch.softmax(1.5 * k, -2)
    kernel = torch.einsum("bhil,bhjl->bhij", (2 * q).exp(), (1.5 * k).exp())
    matrix = kernel / kernel.sum(-1, keepdim=True)
    torch.testing.assert_close(left @ right.mT, matrix)
    torch.testing.assert_close(measures.low_rank_gap(left, right), measures.spectral_gap(matrix))


# What only a method can tell


def test_lln_tells_its_scales_and_they_give_the_gap_without_the_matrix():
    q, k, v = gaussian_qkv(2, 2, 100, 8)
    module = build("lln")
    values, matrix = measure(module, q, k, v)
    alpha, beta = values["alpha"], values["beta"]
    left = torch.softmax(alpha * q + torch.logsumexp(beta * k, -2, keepdim=True), -1)
    right = torch.softmax(beta * k, -2)
    torch.testing.assert_close(measures.low_rank_gap(left, right), measures.spectral_gap(matrix))


def test_adamra_tells_how_many_queries_chose_each_resolution():
    q, k, v = gaussian_qkv(2, 2, 60, 8)
    key_mask = padding(2, 60, kind="scattered")
    module = build("adamra", rates=[2, 8, 32])
    values, _ = measure(module, q, k, v, key_mask)
    chosen = torch.einsum("bhnd,hrd->bhnr", q, module.router.double()).argmax(-1)  # pyright: ignore
    real = key_mask[:, None, :].expand_as(chosen)
    for at, rate in enumerate((2, 8, 32)):
        expected = float((chosen[real] == at).double().mean())
        assert values[f"queries_at_rate_{rate}"] == pytest.approx(expected, abs=1e-6)


def test_routing_tells_its_coverage_and_leaves_the_other_rows_empty():
    q, k, v = gaussian_qkv(2, 2, 60, 8)
    key_mask = padding(2, 60, kind="scattered")
    key_mask[1] = torch.arange(60) < 4  # fewer than a window: clusters have empty slots
    module = build("routing", num_clusters=3, window=10, local_heads=1)
    values, matrix = measure(module, q, k, v, key_mask)
    routed = matrix[:, 0]
    assert 0 < values["query_coverage"] < 1
    assert values["query_coverage"] == pytest.approx(float((routed.sum(2) > 0)[key_mask].double().mean()), abs=1e-6)
    assert values["key_coverage"] == pytest.approx(float((routed.sum(1) > 0)[key_mask].double().mean()), abs=1e-6)
    assert values["empty_rows"] > 0


def test_a_method_without_more_to_tell_tells_nothing():
    q, k, _ = gaussian_qkv(1, 2, 10, 8)
    assert build("softmax").diagnostics(q, k) == {}
