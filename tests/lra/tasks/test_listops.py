"""Generated ListOps is the benchmark's distribution, correctly labelled, and the same everywhere."""

from itertools import islice

import numpy as np
import pytest

from lra import tasks
from lra.tasks.listops.generator import CHUNK, Chunk, expressions, grow_chunk, unique
from lra.tasks.listops.labels import evaluate
from lra.tasks.listops.vocabulary import TOKENS

DIGEST = "47eb624c146f2f9ea2045d150690774f8c43b48c1518ed605fe2090975d0f851"
"""Of `task=listops` with its defaults, when generated. The README prints it."""

SMALL = {"source": "generate", "seed": 7, "train_size": 200, "validation_size": 20, "test_size": 30}
SMALL_DIGEST = "02608851d2a25e253d2a0b638f71ace04dcc5a70e0571f4b3121c446fb70939d"


def encode(text):
    return np.array([TOKENS.index(token) for token in text.split()], np.uint8)


def lengths_of(split):
    return (split.tokens != 0).sum(1)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return tasks.build("listops").prepare(tmp_path_factory.mktemp("data"), progress=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tasks.build("listops", **SMALL).prepare(tmp_path_factory.mktemp("data"), progress=False)


# The same everywhere


def test_the_default_data_has_the_published_digest(full):
    assert full.digest == DIGEST
    assert full.counts == {"train": 96_000, "validation": 2_000, "test": 2_000}
    assert full.source == "generate"


def test_a_small_configuration_has_its_digest(small):
    assert small.digest == SMALL_DIGEST
    assert small.counts == {"train": 200, "validation": 20, "test": 30}


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_nothing(workers):
    def first_chunks(workers):
        return list(islice(expressions(5, workers), 4))

    for one, many in zip(first_chunks(1), first_chunks(workers), strict=True):
        for part in range(3):
            assert np.array_equal(one[part], many[part])


def test_an_expression_depends_on_its_index_alone():
    whole, second_half = grow_chunk(0, 0, 600), grow_chunk(0, 300, 300)
    assert 0 < len(second_half.labels) < len(whole.labels)
    assert np.array_equal(whole.tokens[-len(second_half.labels) :], second_half.tokens)


def test_the_generator_grows_the_trees_of_the_definition():
    """The definition as a recursion in plain integers; the random words are pinned in test_counter_rng."""
    from lra.counter_rng import draw, stream

    def tree(depth, words):
        word = next(words)
        if depth < 10 and word >> 62 == 0:
            operator = ["[MIN", "[MAX", "[MED", "[SM"][word >> 32 & 3]
            arguments = [tree(depth + 1, words) for _ in range(2 + ((word & 0xFFFFFFFF) * 9 >> 32))]
            return [operator, *(token for argument in arguments for token in argument), "]"]
        return [str((word & 0xFFFFFFFF) * 10 >> 32)]

    kept = []
    for index in range(200):
        key = stream(np.uint64(9), np.uint64(index))
        tokens = tree(1, (int(draw(key, np.uint64(counter))) for counter in range(10**6)))
        if 500 < len(tokens) < 2000:
            kept.append(" ".join(tokens))
    grown = [" ".join(TOKENS[token] for token in tokens) for tokens, _ in unique([grow_chunk(9, 0, 200)])]
    assert len(kept) > 5
    assert grown == kept


# Correct


def test_every_test_label_and_every_hundredth_other_is_the_value_of_its_expression(full):
    for name, split in full.splits.items():
        for row in range(0, len(split.labels), 1 if name == "test" else 100):
            assert evaluate(split.tokens[row]) == split.labels[row], (name, row)


@pytest.mark.slow
def test_labels_are_the_values_of_their_expressions(full):
    for name, every in (("train", 10), ("validation", 1), ("test", 1)):
        tokens, labels = (array[::every] for array in full.splits[name])
        wrong = [row for row, expression in enumerate(tokens) if evaluate(expression) != labels[row]]
        assert wrong == [], name


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MIN 3 1 2 ]", 1),
        ("[MAX 3 1 2 ]", 3),
        ("[MED 1 2 ]", 1),
        ("[MED 9 0 5 ]", 5),
        ("[MED 9 8 1 0 ]", 4),
        ("[SM 9 9 9 ]", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[SM [MED [MAX 1 6 ] 3 ] [MIN 8 [SM 5 6 ] ] 4 ]", 9),
    ],
)
def test_the_evaluator_knows_the_operators(expression, value):
    assert evaluate(encode(expression)) == value


@pytest.mark.parametrize("expression", ["", "[MIN 1 2", "1 2", "[SM ]", "1 ]", "[MIN 1 2 ] ]"])
def test_the_evaluator_refuses_what_is_no_expression(expression):
    with pytest.raises(ValueError, match="not an expression"):
        evaluate(encode(expression))


def test_no_expression_occurs_twice(full):
    rows = [hash(tokens.tobytes()) for split in full.splits.values() for tokens in split.tokens]
    assert len(set(rows)) == 100_000


def test_the_first_of_equal_expressions_is_kept():
    def chunk(*rows):
        return Chunk(np.array([[*row, 0] for row in rows], np.uint8), np.full(len(rows), 2), np.arange(len(rows)))

    kept = list(unique([chunk((6, 7), (6, 8), (6, 7)), chunk((6, 8), (9, 9))]))
    assert [(tokens.tolist(), label) for tokens, label in kept] == [([6, 7], 0), ([6, 8], 1), ([9, 9], 1)]


# The benchmark's distribution: simulated values of the released generator, 20,000 trees


def test_lengths_are_those_of_the_benchmark(full):
    lengths = np.concatenate([lengths_of(split) for split in full.splits.values()])
    assert (lengths.min(), lengths.max()) == (501, 1999)
    assert abs(lengths.mean() - 1039) < 10
    assert np.abs(np.quantile(lengths, [0.05, 0.25, 0.5, 0.75, 0.95]) - [540, 706, 961, 1315, 1805]).max() < 15


def test_labels_and_root_operators_are_those_of_the_benchmark(full):
    train = full.splits["train"]
    labels = np.bincount(train.labels, minlength=10) / len(train.labels)
    assert abs(labels[0] - 0.170) < 0.01
    assert abs(labels[9] - 0.167) < 0.01
    assert 0.07 < labels[1:9].min() < labels[1:9].max() < 0.095
    roots = np.bincount(train.tokens[:, 0], minlength=16) / len(train.labels)
    assert np.abs(roots[1:5] - 0.25).max() < 0.006
    assert roots[1:5].sum() == 1


def test_one_tree_in_twelve_is_kept():
    kept = sum(len(chunk.labels) for chunk in islice(expressions(0), 12))
    assert abs(kept / (12 * CHUNK) - 0.083) < 0.004


def test_operators_nest_nine_deep_and_take_two_to_ten_arguments(small):
    for tokens in small.splits["train"].tokens:
        depth = np.cumsum(np.isin(tokens, range(1, 5)).astype(int) - (tokens == 5))
        assert depth.max() == 9
        arguments, counts = [0], set()
        for token in tokens[tokens != 0]:
            if token == 5:
                counts.add(arguments.pop())
                arguments[-1] += 1
            elif token < 5:
                arguments.append(0)
            else:
                arguments[-1] += 1
        assert arguments == [1]
        assert counts <= set(range(2, 11))


# Options


def test_the_closing_bracket_can_be_dropped_and_the_head_is_kept_when_cut(small, tmp_path):
    changed = tasks.build("listops", **SMALL, brackets="drop", max_length=300).prepare(tmp_path, progress=False)
    for name, split in changed.splits.items():
        assert split.tokens.shape[1] == 300
        for whole, cut in zip(small.splits[name].tokens, split.tokens, strict=True):
            assert np.array_equal(whole[whole != 5][:300], cut)
        assert np.array_equal(small.splits[name].labels, split.labels)


def test_another_seed_makes_other_expressions(small, tmp_path):
    other = tasks.build("listops", **{**SMALL, "seed": 8}).prepare(tmp_path, progress=False)
    assert other.digest != small.digest
    assert other.folder.name != small.folder.name
