"""Intervals agree with published and hand-computed values, and mean what they say."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra import stats

quick = settings(max_examples=50, deadline=None)


def test_accuracy_is_in_per_cent() -> None:
    assert stats.accuracy(740, 2000) == 37.0


def test_of_too_few_seeds_there_is_no_statistic() -> None:
    assert stats.mean([]) is None
    assert stats.mean([36.5]) == 36.5
    assert stats.sample_std([]) is stats.sample_std([36.5]) is None
    assert stats.seed_interval([]) is stats.seed_interval([36.5]) is None
    assert stats.item_interval([]) is None


def test_sample_std_divides_by_n_minus_1() -> None:
    assert stats.sample_std([35.0, 36.0, 37.0]) == 1.0


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [  # t from the table: 12.7062 (1 degree of freedom), 4.30265 (2), 2.77645 (4)
        ([36.0, 38.0], 37 - 12.7062, 37 + 12.7062),
        ([35.0, 36.0, 37.0], 36 - 4.30265 / math.sqrt(3), 36 + 4.30265 / math.sqrt(3)),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3 - 2.77645 * math.sqrt(2.5 / 5), 3 + 2.77645 * math.sqrt(2.5 / 5)),
    ],
)
def test_seed_interval_is_students(values: list[float], low: float, high: float) -> None:
    assert stats.seed_interval(values) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), Table I, method 3
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
    ],
)
def test_wilson_interval_is_the_published_one(correct: int, total: int, low: float, high: float) -> None:
    assert stats.wilson_interval(correct, total) == pytest.approx((low, high), abs=0.006)


@quick
@given(st.integers(1, 5000), st.data())
def test_wilson_bounds_are_the_shares_that_the_score_test_just_accepts(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    for bound in stats.wilson_interval(correct, total):
        p = bound / 100
        assert 0 <= p <= 1
        assert abs(correct / total - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / total), abs=1e-7)


def test_half_width_on_listops_is_two_points() -> None:
    assert stats.half_width(stats.wilson_interval(740, 2000)) == pytest.approx(2.1, abs=0.05)


def test_more_seeds_on_the_same_items_do_not_narrow_the_items_interval() -> None:
    one, many = stats.item_interval([(740, 2000)]), stats.item_interval([(730, 2000), (740, 2000), (750, 2000)])
    assert many == pytest.approx(one)
    assert one == stats.wilson_interval(740, 2000)


@quick
@given(st.lists(st.floats(0, 100), min_size=2, max_size=6), st.randoms())
def test_order_of_the_seeds_changes_no_bit(values: list[float], random) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)
    for statistic in (stats.mean, stats.sample_std, stats.seed_interval):
        assert statistic(values) == statistic(shuffled)


def test_a_seed_on_the_class_prior_is_at_chance_and_one_clearly_above_is_not() -> None:
    assert stats.at_chance((340, 2000), 0.17)
    assert stats.at_chance((370, 2000), 0.17)  # 18.5 %: Wilson from 16.9
    assert not stats.at_chance((380, 2000), 0.17)  # 19.0 %: Wilson from 17.3
    assert stats.at_chance((100, 2000), 0.17)
