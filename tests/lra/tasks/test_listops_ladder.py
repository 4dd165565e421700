"""The rungs of ListOps are those that were measured for the benchmark, and the last is exact."""

import numpy as np
import pytest
from records import record, store

from lra import listops_ladder, predictions, tasks
from lra.record import Cell
from lra.tasks.listops.ladder import by_depth, by_length, climb, depth, parse, value
from lra.tasks.listops.vocabulary import TOKENS

MEASURED = [17.0, 36.3, 36.7, 47, 59.3, 73, 83, 89, 93, 96, 97.5]
"""Per cent, of 20,000 simulated expressions; the last seven know 1 to 7 levels."""


def tree(text):
    return parse(np.array([TOKENS.index(token) for token in text.split()], np.uint8))


@pytest.mark.parametrize(("levels", "expected"), [(0, 9), (1, 4), (2, 5), (3, 7)])
def test_what_lies_deeper_has_its_operators_modal_value(levels, expected):
    """The root MAX alone gives 9; then MED of deeper subtrees its 4; then the SM below its 5; then all is known."""
    assert value(tree("[MAX 2 [MED 1 [SM 3 4 ] 9 ] ]"), levels) == expected


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("[MAX 2 [MED 1 [SM 3 4 ] 9 ] ]", 3),
        ("[MAX 9 [MED 1 [SM 3 4 ] 9 ] ]", 0),
        ("[MAX 5 [MIN 1 [SM 3 4 ] 9 ] ]", 1),
        ("[MIN 7 [MAX 1 [MED 2 6 4 ] 5 ] ]", 2),
        ("[MIN 7 [MAX 1 [MED 2 2 ] ] ]", 3),
    ],
)
def test_the_depth_of_an_expression_is_where_its_value_is_settled(text, levels):
    """9 is MAX's modal value; 5 beats a MIN taken for 0; under MAX a MED taken for its 4 would make 4 of 2."""
    assert depth(tree(text)) == levels


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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("ladder")
    return root, tasks.build("listops", **FEW).prepare(root, progress=False)


FEW = {"train_size": 20, "validation_size": 1, "test_size": 300}


def test_items_are_counted_by_depth_and_by_length(data):
    _, prepared = data
    test = prepared.splits["test"]
    lengths = (test.tokens > 0).sum(1)
    right = lengths > 1000
    bins = list(by_length(test, right))
    assert [rung.knows for rung in bins][:3] == ["501 to 750", "751 to 1,000", "1,001 to 1,250"]
    assert [rung.accuracy for rung in bins] == [0, 0, 1, 1, 1]
    assert sum(rung.total for rung in bins) == 300
    guesses = np.array([value(parse(tokens), 2) for tokens in test.tokens])
    depths = list(by_depth(test, guesses == test.labels))
    assert sum(rung.total for rung in depths) == 300
    assert [rung.accuracy for rung in depths[:3]] == [1, 1, 1], "two levels settle what two levels settle"
    assert all(rung.accuracy < 1 for rung in depths[3:])


def made_cell(results, prepared, **config):
    made = record(digest=prepared.digest, config={"task": {"name": "listops", **FEW, **config}})
    labels = np.array(prepared.splits["test"].labels)
    answers = np.where(np.arange(300) < 100, labels, (labels + 1) % 10)
    counts = {"step": 1, "correct": 100, "total": 300}
    made["test"] = {"best": counts, "last": counts}
    store(results, made)
    directory = Cell.of(made).directory(results)
    predictions.write(directory, predictions.Predictions(labels, answers, answers))
    return directory


def test_the_command_takes_a_trained_cell(data, tmp_path, capsys):
    root, prepared = data
    directory = made_cell(tmp_path, prepared)
    assert listops_ladder.main([str(root), "--cell", str(directory)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"softmax listops small published seed0: 33.3 % of ListOps {prepared.digest[:12]}, 300 test")
    assert out.count("%") == 1 + len(list(by_depth(prepared.splits["test"], np.ones(300)))) + 5


@pytest.mark.parametrize(
    ("config", "complaint"),
    [({"seed": 3}, "saw data "), ({"max_length": 700}, "saw data "), ({"name": "pathfinder"}, "is of task=pathfinder")],
)
def test_a_cell_of_other_data_is_refused_in_one_line(data, tmp_path, capsys, config, complaint):
    root, prepared = data
    directory = made_cell(tmp_path, prepared, **config)
    if "name" in config:
        path = directory / "record.json"
        path.write_text(path.read_text().replace('"task": "listops"', '"task": "pathfinder"'))
    assert listops_ladder.main([str(root), "--cell", str(directory)]) == 2
    err = capsys.readouterr().err
    assert f"cell={directory} {complaint}" in err
    assert err.count("\n") == 1
