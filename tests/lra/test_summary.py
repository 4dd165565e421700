"""The summary averages only what is complete and compares only what compares."""

from typing import Any

import pytest
from records import record
from rows import only, summary

from lra import report

LRA = ["listops", "text", "retrieval", "image", "pathfinder"]


def test_average_and_rank_only_where_the_row_is_complete_in_its_suite() -> None:
    made = [record("softmax", task, correct=700 + 20 * i) for i, task in enumerate(LRA)]
    made += [record("mra", task, correct=740) for task in LRA] + [record("lln", "listops", correct=2000)]
    rows = summary(*made)
    softmax, mra, lln = (only(rows, attention=name) for name in ("softmax", "mra", "lln"))
    assert [softmax[task] for task in LRA] == ["35.0", "36.0", "37.0", "38.0", "39.0"]
    assert [softmax["average"], mra["average"], lln["average"]] == ["37.0", "37.0", ""]
    assert [softmax["mean_rank"], mra["mean_rank"], lln["mean_rank"]] == [
        "1.5",
        "1.5",
        "",
    ]  # 2 2 1.5 1 1 and 1 1 1.5 2 2
    assert [lln["listops"], lln["text"]] == ["100.0", ""]
    assert softmax["text_reviews"] == ""


def test_the_offline_suite_has_an_average_of_its_own() -> None:
    tasks = ["listops", "pathfinder", "text_reviews", "image_fashion"]
    made = [record("mra", task, correct=100 * i) for i, task in enumerate(tasks, 1)]
    assert only(summary(*made, suite="offline"))["average"] == "12.5"
    assert only(summary(*made, suite="lra"))["average"] == ""


@pytest.mark.parametrize("other", [{"device": "H100"}, {"protocol": "clean"}, {"budget": "demo"}])
def test_an_average_never_crosses_protocol_budget_or_device(other: dict[str, Any]) -> None:
    rows = summary(*(record("mra", task) for task in LRA[:4]), record("mra", "pathfinder", **other))
    assert len(rows) == 2
    assert {row["average"] for row in rows} == {""}


def test_rows_on_different_data_are_not_ranked_against_each_other() -> None:
    made = [record(name, task) for name in ("softmax", "mra") for task in LRA[1:]]
    made += [record("softmax", "listops", correct=900), record("mra", "listops", digest="other")]
    rows = summary(*made)
    assert {row["mean_rank"] for row in rows} == {"1.0"}
    assert only(rows, attention="mra")["data_digests"].split()[1] == "listops:other"


def test_an_attention_with_two_data_sets_of_a_task_has_an_empty_cell_and_a_problem() -> None:
    made = [record("mra", task) for task in LRA] + [record("mra", "listops", seed=1, digest="other")]
    (row,) = summary(*made)
    assert [row["listops"], row["average"], row["text"]] == ["", "", "35.0"]
    (problem,) = report.build(made).problems
    assert "mra listops small published (CPU) was run on 2 data sets, digest-of-listops, other" in problem


def test_seeds_at_chance_are_counted_over_the_tasks_and_stay_in_the_average() -> None:
    made = [record("mra", task, correct=700) for task in LRA] + [record("mra", "image", seed=1, correct=340)]
    row = only(summary(*made))
    assert [row["image"], row["average"], row["chance_seeds"]] == ["26.0", "33.2", "1"]


def test_failures_are_shown_beside_the_average() -> None:
    made = [record("mra", task) for task in LRA] + [record("mra", "image", seed=1, status="nan")]
    assert [only(summary(*made))[key] for key in ("average", "failures")] == ["35.0", "1"]
    assert [only(summary(record(status="oom")))[key] for key in ("listops", "failures")] == ["", "1"]
