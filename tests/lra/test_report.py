"""The tables say what the records say: nothing mixed, nothing dropped, nothing invented, in any order."""

import csv
import io
import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from records import record, store, store_and_refresh
from rich.console import Console

from lra import literature, report
from lra.record import Record

ROOT = Path(__file__).parents[2]
LRA = ["listops", "text", "retrieval", "image", "pathfinder"]
quick = settings(max_examples=12, deadline=None)

CONTRACT = [
    *("attention", "task", "protocol", "budget", "data_digest", "device", "n_seeds", "accuracy_mean", "accuracy_std"),
    *("seed_ci95_low", "seed_ci95_high", "test_ci95_low", "test_ci95_high", "failures", "selected_on", "published"),
    *("published_source", "published_setting", "published_certainty", "gap", "parameters", "steps_per_s"),
    "peak_mem_mib",
]

records_strategy = st.lists(
    st.builds(
        record,
        st.sampled_from(["softmax", "mra", "mine"]),
        st.sampled_from(["listops", "text", "image_fashion"]),
        st.integers(0, 3),
        correct=st.integers(2, 2000),
        status=st.sampled_from(["ok", "ok", "nan", "preempted"]),
        protocol=st.sampled_from(["small", "clean"]),
        budget=st.sampled_from(["published", "demo"]),
        digest=st.sampled_from([None, None, "other"]),
        device=st.sampled_from(["CPU", "H100"]),
        overrides=st.sampled_from([{}, {}, {"model.dim": 32}]),
        steps_per_s=st.none() | st.floats(0.1, 99),
    ),
    max_size=25,
)


def leaderboard(*records: Record) -> list[dict[str, str]]:
    return _parsed(report.to_csv(report.build(records).leaderboard))


def summary(*records: Record, suite: str = "lra") -> list[dict[str, str]]:
    return [row for row in _parsed(report.to_csv(report.build(records).summary)) if row["suite"] == suite]


def _parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def only(rows: list[dict[str, str]], **values: str) -> dict[str, str]:
    (row,) = [row for row in rows if values.items() <= row.items()]
    return row


# --- the leaderboard ---------------------------------------------------------------------------------------------


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


# --- published values --------------------------------------------------------------------------------------------


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


# --- the summary -------------------------------------------------------------------------------------------------


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


def test_failures_are_shown_beside_the_average() -> None:
    made = [record("mra", task) for task in LRA] + [record("mra", "image", seed=1, status="nan")]
    assert [only(summary(*made))[key] for key in ("average", "failures")] == ["35.0", "1"]
    assert [only(summary(record(status="oom")))[key] for key in ("listops", "failures")] == ["", "1"]


# --- any records, any order --------------------------------------------------------------------------------------


@quick
@given(records_strategy, st.randoms())
def test_tables_are_byte_identical_whatever_the_order(records: list[Record], random) -> None:
    shuffled = list(records)
    random.shuffle(shuffled)
    one, other = report.build(records), report.build(shuffled)
    assert report.to_csv(one.leaderboard) == report.to_csv(other.leaderboard)
    assert report.to_csv(one.summary) == report.to_csv(other.summary)
    assert one.problems == other.problems


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


def test_without_records_the_tables_are_their_headers(tmp_path: Path) -> None:
    tables = report.refresh(tmp_path / "new")
    assert [len(path.read_text().splitlines()) for path in tables.paths] == [1, 1]
    assert tables.paths[0].read_text().startswith("attention,task,protocol,budget,data_digest,device,n_seeds,")
    assert tables.paths[1].read_text().startswith("attention,protocol,budget,suite,device,listops,text,")


# --- files and screen --------------------------------------------------------------------------------------------


def test_a_broken_record_is_a_problem_and_the_tables_go_on(tmp_path: Path) -> None:
    store(tmp_path, record(), record(seed=1, schema=9))
    tables = report.refresh(tmp_path)
    assert tables.leaderboard["n_seeds"].tolist() == [1]
    assert tables.problems == [
        "runs/small/published/listops/softmax/seed1/record.json: schema=9 is unknown; this version reads 1"
    ]


def test_eight_processes_that_finish_at_once_leave_whole_tables_of_all_cells(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["records", "lra.report"])  # pandas is imported once, not eight times
    together = context.Barrier(8)
    processes = [context.Process(target=store_and_refresh, args=(tmp_path, k, together)) for k in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * 8
    written = (tmp_path / "leaderboard.csv").read_bytes(), (tmp_path / "summary.csv").read_bytes()
    assert _parsed(written[0].decode())[0]["seeds"] == "0 1 2 3 4 5 6 7"
    tables = report.refresh(tmp_path)
    assert written == (tables.paths[0].read_bytes(), tables.paths[1].read_bytes())
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_refresh_waits_for_its_turn_and_reads_after_it(tmp_path: Path) -> None:
    store(tmp_path, record(seed=0))
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / ".tables.lock"):
            refreshing = pool.submit(report.refresh, tmp_path)
            with pytest.raises(TimeoutError):
                refreshing.result(timeout=0.5)
            store(tmp_path, record(seed=1))
        assert refreshing.result(timeout=60).leaderboard["n_seeds"].tolist() == [2]


def test_the_script_rebuilds_says_where_and_names_problems(tmp_path: Path) -> None:
    store(tmp_path, record(), record(seed=1, schema=9))
    command = [sys.executable, "scripts/report.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"{tmp_path / 'leaderboard.csv'}: 1 rows" in done.stdout
    assert "schema=9 is unknown" in done.stderr
    missing = subprocess.run(
        [*command[:2], str(tmp_path / "no")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].endswith("is no folder; name the one that holds runs/")


def shown(*made: Record, multirun: bool = False, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    if multirun:
        report.print_multirun(made, console)
    else:
        row = report.row_of(report.build(made).leaderboard, made[0])
        report.print_cell(made[0], "results", console, row)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_finished_cell_shows_accuracy_interval_prior_published_value_speed_memory_and_files() -> None:
    text = shown(record())
    for part in ("35.00 %", "32.9 to 37.1", "17.0 %", "37.10 %", "4.00 steps/s", "100 MiB"):
        assert part in text
    assert "results/runs/small/published/listops/softmax/seed0" in text
    assert "demo" not in text
    assert "over 3 seeds" in shown(*(record(seed=k) for k in range(3)))


def test_a_demo_says_on_the_screen_that_it_does_not_compare() -> None:
    assert "does not compare" in shown(record(budget="demo"))
    assert "does not compare" in shown(record(budget="demo"), multirun=True)


def test_a_failed_cell_shows_its_status_and_its_message_to_the_letter() -> None:
    text = shown(record(status="oom", message="CUDA [bold]out of memory[/nothing]"))
    assert "oom" in text
    assert "CUDA [bold]out of memory[/nothing]" in text


def test_certainty_that_is_not_source_is_said_on_the_screen() -> None:
    assert "certainty: memory" in shown(record("mra"))
    assert "per-task numbers unknown" in shown(record("adamra"))


def test_a_multirun_shows_every_cell_and_why_one_failed() -> None:
    text = shown(record(), record("mra", seed=2, status="error", message="boom [x]\nmore"), multirun=True, width=80)
    assert "softmax     listops      0   ok" in text
    assert "mra listops small published seed2: error: boom [x]" in text
    assert "1 of 2 cells ok" in text
