"""The tables as a reader of the CSV files sees them, and random records to make them of."""

import csv
import io

from hypothesis import strategies as st
from records import record

from lra import report
from lra.record import Record

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
    return parsed(report.to_csv(report.build(records).leaderboard))


def summary(*records: Record, suite: str = "lra") -> list[dict[str, str]]:
    return [row for row in parsed(report.to_csv(report.build(records).summary)) if row["suite"] == suite]


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def only(rows: list[dict[str, str]], **values: str) -> dict[str, str]:
    (row,) = [row for row in rows if values.items() <= row.items()]
    return row
