"""The table of training speed: medians beside the floor, of cells that had a GPU for themselves."""

import pytest
from records import record

from lra import documents, report
from lra.record import Record

WALL = {"train": 10.0, "compile": 20.0, "validate": 5.0, "total": 40.0}


def cell(
    attention: str, steps_per_s: float, *, seed: int = 0, task: str = "listops", sharing: int = 1, **more
) -> Record:
    made = record(attention, task, seed, device="H100", precision="bf16", impl="triton") | more
    made |= {"steps": 5000, "steps_per_s": steps_per_s, "peak_mem_mib": 100.0 + seed, "wall_s": WALL}
    made["versions"] = {"torch": "2.11.0"}
    made["device"]["sharing"] = sharing
    return made


def test_ratios_are_medians_over_the_floor_of_the_same_task():
    speeds = [cell("lln", 800.0, seed=0), cell("lln", 500.0, seed=1), cell("lln", 400.0, seed=2)]
    table = report.build([cell("none", 1000.0), *speeds, cell("lln", 100.0, task="text_reviews")]).steps
    rows = {(row.task, row.attention): row for row in table.itertuples()}
    assert len(rows) == 3
    mine = rows["listops", "lln"]
    assert (mine.n_seeds, mine.ms_per_step, mine.floor_ratio, mine.peak_mem_mib) == (3, 2.0, 2.0, 102.0)
    assert (mine.train_s, mine.compile_s, mine.validate_s, mine.wall_s) == (10.0, 20.0, 5.0, 40.0)
    assert rows["listops", "none"].floor_ratio == 1.0
    assert rows["text_reviews", "lln"].floor_ratio != rows["text_reviews", "lln"].floor_ratio  # NaN: no floor there


def test_a_cell_that_shared_its_gpu_or_had_none_or_failed_gives_no_row(tmp_path):
    crowded, failed = cell("lln", 800.0, sharing=5), cell("lln", 800.0) | {"status": "nan"}
    on_cpu = cell("lln", 800.0)
    on_cpu["device"]["name"] = "CPU (x86_64, 2 threads)"
    assert report.build([crowded, failed, on_cpu]).steps.empty
    assert [path.name for path in report.refresh(tmp_path).paths] == ["leaderboard.csv", "summary.csv"]


def test_lightning_is_what_a_run_takes_beyond_the_bare_loop():
    made = [cell("lln", 800.0, bare_steps_per_s=840.0), cell("none", 1000.0)]
    overhead = report.build(made).steps.set_index("attention")["lightning_overhead"]
    assert overhead["lln"] == pytest.approx(0.05)
    assert overhead.isna()["none"]


def test_documents_have_a_table_of_steps_for_each_task_without_columns_that_nobody_measured():
    speeds = [cell("none", 1000.0, bare_steps_per_s=1010.0), cell("lln_diag", 800.0), cell("lln", 800.0, task="image")]
    tables = report.build([made | {"cell": made["cell"] | {"budget": "steps"}} for made in speeds])
    text = documents.markdown(tables.leaderboard, tables.summary, tables.steps)
    image, listops = text.partition("## Training steps, listops")[::2]
    assert text.count("## ") == 2  # accuracies of this budget mean nothing
    assert "data digest-of-li, bf16, torch 2.11.0" in listops
    assert "| attention | ms a step | over none | Lightning % | MiB | seeds |" in listops
    assert "| none | 1.000 | 1.00 | 1.0 | 100 | 1 |\n| lln\\_diag | 1.250 | 1.25 |  | 100 | 1 |" in listops
    assert "| attention | ms a step | MiB | seeds |" in image
    assert documents.latex(tables.leaderboard, tables.summary, tables.steps).count(r"\begin{table}") == 2


def test_a_first_step_is_cold_or_warm():
    times = [("cold", 30.0), ("warm", 6.0), ("warm", 8.0), ("none", 1.0)]
    made = [cell("lln", 800.0, seed=s, compile_cache=c, first_step_s=t) for s, (c, t) in enumerate(times)]
    (row,) = report.build(made).steps.itertuples()
    assert (row.first_step_cold_s, row.first_step_warm_s) == (30.0, 7.0)


def test_a_cell_that_several_processes_trained_tells_its_speed_but_no_seconds():
    """The last one knows how long it took itself, which is less than the cell did."""
    made = [cell("lln", 500.0), cell("lln", 500.0, seed=1, processes=2, wall_s=dict.fromkeys(WALL, 1.0))]
    (row,) = report.build(made).steps.itertuples()
    assert (row.n_seeds, row.ms_per_step, row.train_s, row.wall_s) == (2, 2.0, 10.0, 40.0)


def test_cells_that_ran_for_their_speed_alone_have_no_accuracy():
    made = [cell("lln", 800.0), cell("none", 900.0)]
    for one in made:
        one["cell"]["budget"] = "steps"
    tables = report.build(made)
    assert len(tables.steps) == 2
    assert tables.leaderboard.empty
    assert tables.summary.empty


def test_the_table_does_not_depend_on_the_order_of_the_records():
    made = [cell(name, 500.0 + seed, seed=seed) for name in ("lln", "none", "mra") for seed in range(3)]
    assert report.to_csv(report.build(made).steps) == report.to_csv(report.build(made[::-1]).steps)
