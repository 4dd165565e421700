"""The rungs of ListOps are those that were measured for the benchmark, and the last is exact."""

import numpy as np
import pytest

from lra import tasks
from lra.tasks.listops.ladder import climb, parse, value
from lra.tasks.listops.vocabulary import TOKENS

MEASURED = [17.0, 36.3, 36.7, 47, 59.3, 73, 83, 89, 93, 96, 97.5]
"""Per cent, of 20,000 simulated expressions; the last seven know 1 to 7 levels."""


def tree(text):
    return parse(np.array([TOKENS.index(token) for token in text.split()], np.uint8))


@pytest.mark.parametrize(("levels", "expected"), [(0, 9), (1, 4), (2, 5), (3, 7)])
def test_what_lies_deeper_has_its_operators_modal_value(levels, expected):
    """The root MAX alone gives 9; then MED of deeper subtrees its 4; then the SM below its 5; then all is known."""
    assert value(tree("[MAX 2 [MED 1 [SM 3 4 ] 9 ] ]"), levels) == expected


def test_a_cut_expression_is_refused():
    with pytest.raises(ValueError, match=r"needs task\.brackets=keep and task\.max_length=2000"):
        tree("[MAX 2 [MED 1")


def test_the_rungs_are_those_of_the_benchmark(tmp_path):
    data = tasks.build("listops", train_size=3000, validation_size=1, test_size=1500).prepare(tmp_path, progress=False)
    rungs = [100 * rung.accuracy for rung in climb(data.splits["train"], data.splits["test"])]
    assert len(rungs) == 13
    assert rungs[-1] == 100
    for rung, measured in zip(rungs, MEASURED, strict=False):
        assert abs(rung - measured) < 4  # three standard deviations of 1,500
