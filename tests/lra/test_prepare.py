"""`scripts/prepare.py` prepares what it can, lists it, and says what is missing."""

import pytest

from lra import prepare, tasks

FEW = ("budget=demo", "++task.train_size=20", "++task.validation_size=4", "++task.test_size=4")


def test_prepared_data_is_listed_with_counts_and_digest(tmp_path, capsys):
    assert prepare.main(["task=listops", *FEW, f"data.root={tmp_path}"]) == 0
    out = "".join(capsys.readouterr().out.split())
    data = tasks.build("listops", train_size=20, validation_size=4, test_size=4).prepare(tmp_path, progress=False)
    assert f"listopsgenerate2044{data.digest[:10]}" in out


def test_missing_data_is_named_and_the_rest_is_prepared(tmp_path, capsys):
    assert prepare.main(["task=retrieval,listops", *FEW, f"data.root={tmp_path}", "++task.source=auto"]) == 1
    out = capsys.readouterr().out
    assert out.index("preparing retrieval, 1 of 2") < out.index("preparing listops, 2 of 2"), "a log shows progress"
    assert "retrieval: the AAN pairs cannot be downloaded" in out
    assert "generate" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["task=pathfindr"], "task=pathfindr is unknown; known: image, "),
        (["task=listops", "task.sead=1"], "task.sead is unknown"),
        (["task=listops", "task.source=moon"], "task.source=moon is not one of auto, generate, release"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, complaint, capsys):
    assert prepare.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(complaint)
    assert err.count("\n") == 1


def test_the_default_needs_no_hub():
    assert prepare.parse(["data.root=x"]) == (list(prepare.OFFLINE), ["data.root=x"])
    assert set(prepare.OFFLINE) <= set(tasks.names())
    assert prepare.parse(["task=all"])[0] == tasks.names()
