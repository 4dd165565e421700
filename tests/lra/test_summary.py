"""The summary averages only what is complete and compares only what compares."""

from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from records import record
from rows import leaderboard, only, records_strategy, summary

from lra import report
from lra.record import Record

LRA = ["listops", "text", "retrieval", "image", "pathfinder"]

quick = settings(max_examples=12, deadline=None)


def the_value(rows: list[dict[str, str]]) -> str:
    """Of the leaderboard's rows of a cell of the summary: the only accuracy; none where there is none, or several."""
    present = [row["accuracy_mean"] for row in rows if row["accuracy_mean"]]
    return present[0] if len(present) == 1 else ""


@quick
@given(records_strategy)
def test_a_cell_is_the_one_accuracy_of_its_kind_or_empty_and_an_average_is_of_full_rows(records: list[Record]) -> None:
    """Nothing missing is zero, and no protocol, budget, data or device enters another one's cell or average."""
    rows, suites = leaderboard(*records), {"both": ["listops", "text"], "one": ["image_fashion"]}
    for suite, tasks in suites.items():
        with mock.patch.object(report, "suites", return_value=suites):
            table = summary(*records, suite=suite)
        for found in table:
            kind = {key: found[key] for key in ("attention", "protocol", "budget", "device")}
            same = [row for row in rows if kind.items() <= row.items()]
            values = [the_value([row for row in same if row["task"] == task]) for task in tasks]
            assert [found[task] for task in tasks] == values
            full = all(values)
            assert bool(found["average"]) == full
            if full:
                assert float(found["average"]) == pytest.approx(sum(map(float, values)) / len(tasks), abs=1e-3)


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
    assert {row["mean_rank"] for row in rows} == {""}
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
