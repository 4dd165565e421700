"""Statistics of accuracies: over seeds (Student's t) and over the test set (Wilson). All accuracies in per cent."""

import statistics
from collections.abc import Sequence

from scipy.special import bdtr, chdtrc, ndtri, stdtrit

Interval = tuple[float, float]
Count = tuple[int, int]
"""Correct and total items of one seed."""

FEW_DISCORDANT = 25
"""Below so many discordant items McNemar's test is exact; from there χ² with continuity correction agrees with it."""


def accuracy(correct: float, total: int) -> float:
    """100 · correct / total, in per cent."""
    return 100.0 * correct / total


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean, correctly rounded and so the same in any order; None of no values."""
    return statistics.fmean(values) if values else None


def sample_std(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1 in the denominator; None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def seed_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Student-t interval of the mean over seeds: mean ± t_(n-1) · s / √n. None of fewer than two values.

    It says how well the mean over *training runs* is known, given this test set. Not cut at 0 or 100.
    """
    if len(values) < 2:
        return None
    centre, quantile = statistics.fmean(values), float(stdtrit(len(values) - 1, 0.5 + confidence / 2))
    reach = quantile * statistics.stdev(values) / len(values) ** 0.5
    return centre - reach, centre + reach


def wilson_interval(correct: float, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a binomial share, in per cent: the p with |p̂ - p| <= z · √(p (1 - p) / n).

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927). `correct` may be a fraction, `total` >= 1.
    """
    share, z2 = correct / total, float(ndtri(0.5 + confidence / 2)) ** 2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    reach = (z2 * (share * (1 - share) / total + z2 / (4 * total * total))) ** 0.5 / (1 + z2 / total)
    return 100 * max(0.0, centre - reach), 100 * min(1.0, centre + reach)


def item_interval(counts: Sequence[Count], confidence: float = 0.95) -> Interval | None:
    """Wilson interval over the items of the test set, at the mean share over seeds. None of no seeds.

    It says how far a test set of this size can be off. All seeds answer the same items, so more seeds do not make
    the set larger: n is the number of items of one seed (the smallest, should they differ), not their sum.
    """
    if not counts:
        return None
    share = statistics.fmean(correct / total for correct, total in counts)
    items = min(total for _, total in counts)
    return wilson_interval(share * items, items, confidence)


def half_width(interval: Interval) -> float:
    """Half the length of an interval: the number behind ±, exact for the symmetric ones."""
    return (interval[1] - interval[0]) / 2


def at_chance(count: Count, class_prior: float) -> bool:
    """Whether a seed never left the class prior (a share in 0 .. 1): its own Wilson interval begins at or below it."""
    return wilson_interval(*count)[0] <= 100 * class_prior


def mcnemar(only_first: int, only_second: int) -> tuple[float, str]:
    """Two-sided p value of two models being right equally often on the same items, and how it was found.

    only_first, only_second   items that one of the two gets right and the other wrong; the others say nothing

    With n of them in all, under the hypothesis Binomial(n, 1/2) of them fall to each: "exact" where n is small,
    "chi2" of (|only_first - only_second| - 1)² / n with one degree of freedom where it is not.
    Source: McNemar, Psychometrika 12 (1947); correction of Edwards, Psychometrika 13 (1948).
    """
    n = only_first + only_second
    if n < FEW_DISCORDANT:
        return min(1.0, 2 * float(bdtr(min(only_first, only_second), n, 0.5))), "exact"
    return float(chdtrc(1, max(0, abs(only_first - only_second) - 1) ** 2 / n)), "chi2"
