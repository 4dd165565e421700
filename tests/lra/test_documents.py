"""Markdown and LaTeX say what the CSV says, in any order of the records."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import record

from lra import documents, report
from lra.record import Record

TASKS = ("listops", "pathfinder", "text_reviews", "image_fashion")


def rendered(*records: Record) -> tuple[str, str]:
    tables = report.build(records)
    return (
        documents.markdown(tables.leaderboard, tables.summary),
        documents.latex(tables.leaderboard, tables.summary),
    )


def offline(attention: str, correct: int, **changes: Any) -> list[Record]:
    return [record(attention, task, correct=correct, **changes) for task in TASKS]


def test_markdown_has_a_table_a_suite_and_one_a_task() -> None:
    text, _ = rendered(*offline("mra_s", 800), record("mra_s", seed=1, correct=700), record("lln", status="oom"))
    assert "## Suite offline\n\nProtocol small, budget published, CPU\n\n" in text
    assert (
        "| attention | listops | pathfinder | text\\_reviews | image\\_fashion | average | mean rank | failed |" in text
    )
    assert "| mra\\_s | 37.50 | 40.00 | 40.00 | 40.00 | 39.38 |  |  |" in text
    section = text.partition("data digest-of-li")[2].partition("##")[0]
    assert "| mra\\_s | 37.50 ± 3.54 | 2 |" in section
    assert "oom:1" in text
    assert "| 5.7 – 69.3 |" in section  # 37.5 ± 12.7062 · 2.5, Student's t over the two seeds


def test_seeds_at_chance_are_shown_in_both_tables() -> None:
    text, _ = rendered(*offline("mra", 800), record("mra", seed=1, correct=340))
    assert "| mean rank | failed | at chance |" in text
    assert "| mra | 28.50 | 40.00 | 40.00 | 40.00 | 37.12 |  |  | 1 |" in text
    assert "| attention | accuracy % | seeds | at chance | seeds interval |" in text
    assert "at chance" not in rendered(*offline("mra", 800))[0]


def test_latex_escapes_what_latex_reads_as_its_own() -> None:
    _, text = rendered(*offline("mra_s", 800, overrides={"model.dim": 32}, starred=True))
    assert r"mra\_s+" in text
    assert r"accuracy \%" in text
    assert "±" not in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") > 1
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert "_" not in line.replace(r"\_", "")
            assert "%" not in line.replace(r"\%", "")


def test_rows_of_latex_have_as_many_cells_as_their_head() -> None:
    _, text = rendered(*offline("mra", 800), record("lln", seed=1, steps_per_s=None))
    for table in text.split(r"\begin{table}")[1:]:
        lines = [line for line in table.splitlines() if line.endswith(r"\\")]
        columns = len(table.partition(r"\begin{tabular}{")[2].partition("}")[0])
        assert len(lines) >= 2
        assert {line.count(" & ") + 1 for line in lines} == {columns}


def test_a_missing_cell_is_empty_not_zero() -> None:
    text, _ = rendered(*offline("mra", 800)[:2])
    row = next(line for line in text.splitlines() if line.startswith("| mra |"))
    assert row == "| mra | 40.00 | 40.00 |  |  |  |"
    assert "nan" not in text.lower()


@pytest.mark.parametrize("other", [{"device": "H100"}, {"protocol": "clean"}, {"digest": "x"}, {"budget": "demo"}])
def test_what_does_not_compare_stands_in_tables_of_its_own(other: dict[str, Any]) -> None:
    text, _ = rendered(record("mra"), record("lln", **other))
    assert text.count("## listops") == 2


def test_without_records_there_is_a_title() -> None:
    assert rendered() == ("# Results\n", "% Needs \\usepackage{booktabs}.\n")


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.builds(
            record,
            st.sampled_from(["softmax", "mra"]),
            st.sampled_from(["listops", "text"]),
            st.integers(0, 3),
            correct=st.integers(2, 2000),
            status=st.sampled_from(["ok", "ok", "nan"]),
            device=st.sampled_from(["CPU", "H100"]),
        ),
        max_size=12,
    ),
    st.randoms(),
)
def test_documents_are_byte_identical_whatever_the_order(records: list[Record], random) -> None:
    shuffled = list(records)
    random.shuffle(shuffled)
    assert rendered(*records) == rendered(*shuffled)
