"""What a finished cell and a finished multirun show on the screen."""

import io

from records import record
from rich.console import Console

from lra import report
from lra.record import Record


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


def test_a_published_value_beside_a_cell_with_other_options_is_said_not_to_compare() -> None:
    assert "does not compare" not in shown(record())
    changed = shown(record(overrides={"model.dim": 32}, starred=True), width=240)
    assert "does not compare, this cell overrides model.dim" in changed


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
