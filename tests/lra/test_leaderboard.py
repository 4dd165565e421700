"""The leaderboard says what the records say: nothing mixed, nothing dropped, nothing invented, in any order."""

from typing import Any

import pytest
from hypothesis import given, settings
from records import record
from rows import leaderboard, only, records_strategy

from lra import literature, report
from lra.record import Record

quick = settings(max_examples=12, deadline=None)

CONTRACT = [
    *("attention", "task", "protocol", "budget", "data_digest", "device", "n_seeds", "accuracy_mean", "accuracy_std"),
    *("seed_ci95_low", "seed_ci95_high", "test_ci95_low", "test_ci95_high", "failures", "selected_on", "published"),
    *("published_source", "published_setting", "published_certainty", "gap", "parameters", "steps_per_s"),
    "peak_mem_mib",
]


def test_a_row_has_the_columns_of_the_contract_and_hand_computed_numbers() -> None:
    counts = enumerate([700, 720, 740])
    (row,) = leaderboard(*(record(seed=k, correct=c, steps_per_s=4.0 + k, peak_mem_mib=100.0 + k) for k, c in counts))
    assert set(CONTRACT) <= set(row)
    assert row["n_seeds"] == "3"
    assert row["accuracy_mean"] == "36.0"
    assert row["accuracy_std"] == "1.0"
    assert [row["seed_ci95_low"], row["seed_ci95_high"]] == ["33.5159", "38.4841"]  # 36 ± 4.302653 / √3
    assert [float(row["test_ci95_low"]), float(row["test_ci95_high"])] == pytest.approx([33.93, 38.13], abs=0.01)
    assert row["last_accuracy_mean"] == "35.9"
    assert [row["failures"], row["chance_seeds"], row["class_prior"]] == ["0", "0", "17.0"]
    assert [row["selected_on"], row["parameters"]] == ["validation", "209802"]
    assert [row["steps_per_s"], row["peak_mem_mib"]] == ["5.0", "102.0"]
    assert row["published"] == "37.1"
    assert row["gap"] == "-1.1"
    assert row["published_source"].startswith("Transformer (softmax) in Xiong+ Nystromformer")
    assert row["published_setting"].startswith("PyTorch harness: 2 layers")
    assert row["published_certainty"] == "source"


def test_one_seed_has_no_interval_over_seeds_but_one_of_the_test_set() -> None:
    (row,) = leaderboard(record())
    assert row["accuracy_std"] == row["seed_ci95_low"] == row["seed_ci95_high"] == ""
    assert float(row["test_ci95_low"]) < 35.0 < float(row["test_ci95_high"])


@pytest.mark.parametrize(
    "other",
    [
        {"protocol": "clean"},
        {"budget": "demo"},
        {"digest": "other"},
        {"device": "H100"},
        {"attention": "mra"},
        {"task": "text"},
        {"overrides": {"attention.block_size": 16}},
        {"overrides": {"model.dim": 32}, "starred": True},
    ],
)
def test_what_does_not_compare_never_shares_a_row(other: dict[str, Any]) -> None:
    rows = leaderboard(record(seed=0), record(seed=1, correct=1000, **other))
    assert sorted(row["accuracy_mean"] for row in rows) == ["35.0", "50.0"]
    assert {row["n_seeds"] for row in rows} == {"1"}


def test_two_devices_of_a_kind_are_another_device() -> None:
    both = {"name": "H100", "count": 2, "driver": None}
    rows = leaderboard(record(device="H100"), record(seed=1) | {"device": both})
    assert sorted(row["device"] for row in rows) == ["2 x H100", "H100"]


def test_failed_cells_are_counted_in_their_row_though_they_know_no_data() -> None:
    (row,) = leaderboard(record(seed=0), record(seed=1, status="oom"), record(seed=2, status="nan"))
    assert [row["n_seeds"], row["failures"], row["failure_kinds"]] == ["1", "2", "nan:1 oom:1"]
    assert row["accuracy_mean"] == "35.0"


def test_a_failed_cell_without_any_finished_one_has_a_row_with_empty_numbers() -> None:
    (row,) = leaderboard(record(status="timeout"))
    assert [row["n_seeds"], row["failures"]] == ["0", "1"]
    assert row["accuracy_mean"] == row["data_digest"] == row["device"] == row["steps_per_s"] == row["gap"] == ""


def test_a_failed_cell_that_may_belong_to_two_rows_has_its_own() -> None:
    rows = leaderboard(record(), record(seed=1, digest="other"), record(seed=2, status="oom"))
    assert only(rows, data_digest="")["failures"] == "1"
    assert [row["failures"] for row in rows if row["data_digest"]] == ["0", "0"]


def test_seeds_that_never_left_the_class_prior_stay_in_the_mean_and_are_counted() -> None:
    (row,) = leaderboard(record(seed=0, correct=800), record(seed=1, correct=340))
    assert [row["accuracy_mean"], row["chance_seeds"]] == ["28.5", "1"]


def test_seeds_are_listed_by_number_whenever_they_finished() -> None:
    times = {2: "2026-01-01", 0: "2026-01-02", 10: "2026-01-03", 1: "2026-01-04"}
    (row,) = leaderboard(*(record(seed=seed, finished=time) for seed, time in times.items()))
    assert row["seeds"] == "0 1 2 10"


def test_code_of_a_row_names_every_revision_and_a_changed_checkout() -> None:
    changed = {"revision": "0123456789abcdef", "dirty": True}
    (row,) = leaderboard(record(seed=0), record(seed=1, code=changed))
    assert row["code"] == "0123456789ab|0123456789ab-dirty"


def test_speed_of_two_implementations_is_not_averaged() -> None:
    (row,) = leaderboard(record(seed=0), record(seed=1, impl="triton"))
    assert [row["impl"], row["steps_per_s"], row["peak_mem_mib"]] == ["reference|triton", "", ""]
    assert row["n_seeds"] == "2"


def test_speed_is_that_of_the_seeds_that_shared_the_device_least() -> None:
    shared = {"name": "H100", "count": 1, "sharing": 4}
    crowded = [record(seed=seed, device="H100") | {"device": shared, "steps_per_s": 1.0} for seed in (1, 2)]
    alone = record(seed=0, device="H100") | {"device": shared | {"sharing": 1}}
    assert [row["steps_per_s"] for row in leaderboard(alone, *crowded)] == ["4.0"]
    assert [row["steps_per_s"] for row in leaderboard(*crowded)] == ["1.0"]


def test_memory_that_was_not_measured_is_empty_not_zero() -> None:
    (row,) = leaderboard(record(peak_mem_mib=None, steps_per_s=None, class_prior=None, parameters=None))
    assert row["peak_mem_mib"] == row["steps_per_s"] == row["class_prior"] == row["chance_seeds"] == ""
    assert row["parameters"] == ""


def test_a_starred_row_carries_a_star_and_its_overrides_and_no_gap() -> None:
    (row,) = leaderboard(record("mra", overrides={"model.dim": 32}, starred=True))
    assert row["attention"].startswith("mra+")
    assert row["attention"].endswith("*")
    assert row["overrides"] == '{"model.dim":32}'
    assert [row["published"], row["gap"]] == ["37.2", ""]


def test_a_demo_shows_the_published_value_and_no_gap() -> None:
    (row,) = leaderboard(record(budget="demo"))
    assert [row["budget"], row["published"], row["gap"]] == ["demo", "37.1", ""]


def test_rows_of_a_task_are_sorted_by_accuracy_and_failures_come_last() -> None:
    made = [record("mra", correct=600), record("adamra", status="nan", device="CPU"), record("lln", correct=900)]
    rows = leaderboard(*made, record("softmax", correct=700))
    assert [row["attention"] for row in rows if row["device"]] == ["lln", "softmax", "mra"]


def test_a_doubled_record_counts_once_and_of_two_that_differ_the_last_finished() -> None:
    old, new = record(correct=700), record(correct=800, finished="2026-02-01T00:00:00+00:00")
    tables = report.build([new, old, old, new])
    assert tables.leaderboard["n_seeds"].tolist() == [1]
    assert tables.leaderboard["accuracy_mean"].tolist() == [40.0]
    assert tables.problems == [
        "softmax listops small published seed0: several records of this cell differ; the last finished counts"
    ]
    assert report.build([old, old]).problems == []


# Published values


@pytest.mark.parametrize(
    ("attention", "task", "protocol", "value", "certainty"),
    [
        ("softmax", "retrieval", "small", 79.35, "source"),
        ("softmax", "retrieval", "original", 57.46, "source"),
        ("mra", "text", "small", 65.4, "memory"),
        ("mra_s", "image", "small", 41.1, "memory"),
        ("lln_diag", "listops", "small", 38.91, "memory"),
        ("nystromformer", "image", "small", 41.58, "source"),
        ("combiner", "listops", "original", 36.65, "source"),
    ],
)
def test_published_value(attention: str, task: str, protocol: str, value: float, certainty: str) -> None:
    known = literature.lookup(attention, task, protocol)
    assert known is not None
    assert (known.accuracy, known.certainty) == (value, certainty)


def test_adamra_and_routing_say_why_they_have_no_published_value() -> None:
    rows = leaderboard(record("adamra"), record("routing"))
    assert [row["published"] for row in rows] == ["", ""]
    assert [row["gap"] for row in rows] == ["", ""]
    assert "per-task numbers unknown" in only(rows, attention="adamra")["published_setting"]
    assert "any LRA number is new" in only(rows, attention="routing")["published_setting"]


@pytest.mark.parametrize(
    ("attention", "task", "protocol"),
    [
        ("lln", "listops", "small"),  # published with Diag only
        ("softmax", "text_reviews", "small"),  # a stand-in is not the task
        ("softmax", "listops", "clean"),  # nobody published under it
        ("combiner", "listops", "small"),  # published under another protocol
        ("combiner", "pathfinder", "original"),  # published on the easier split
        ("mine", "listops", "small"),
    ],
)
def test_what_does_not_compare_has_no_published_value(attention: str, task: str, protocol: str) -> None:
    assert literature.lookup(attention, task, protocol) is None


# Any records


@quick
@given(records_strategy)
def test_every_cell_is_counted_once_and_rows_are_unique(records: list[Record]) -> None:
    rows = leaderboard(*records)
    cells = {(*_row(each), each["cell"]["seed"], each["status"] == "ok") for each in records}
    finished, failed = (sum(cell[-1] == state for cell in cells) for state in (True, False))
    assert sum(int(row["n_seeds"]) for row in rows) == finished
    assert sum(int(row["failures"]) for row in rows) == failed
    keys = [tuple(row[key] for key in ("attention", *CONTRACT[1:6])) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert (row["accuracy_mean"] == "") == (row["n_seeds"] == "0")
        assert (row["accuracy_std"] == "") == (int(row["n_seeds"]) < 2)


def _row(made: Record) -> tuple[str, ...]:
    cell = made["cell"]
    names = [str(cell[key]) for key in ("attention", "task", "protocol", "budget", "overrides")]
    return (*names, (made.get("data") or {}).get("digest", ""), (made.get("device") or {}).get("name", ""))
