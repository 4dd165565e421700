"""The tables of the page: what a reader compares, as text, with the number behind it to sort by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lra.page.markup import Markup, join, tag
from lra.report import Tables

Columns = Mapping[str, tuple[str, str]]
"""Column of a table to its heading and the format of its numbers; columns that are empty throughout are left out."""

SUMMARY_LAST: Columns = {
    "average": ("average", ".2f"), "mean_rank": ("mean rank", ".2f"), "failures": ("failed", "d"),
    "chance_seeds": ("at chance", "d"), "suite": ("suite", ""),
    "protocol": ("protocol", ""), "budget": ("budget", ""), "device": ("device", ""),
}  # fmt: skip

LEADERBOARD: Columns = {
    "attention": ("attention", ""), "task": ("task", ""),
    "accuracy_mean": ("accuracy %", ".2f"), "accuracy_std": ("±", ".2f"), "n_seeds": ("seeds", "d"),
    "test_ci95_low": ("95 % test, from", ".1f"), "test_ci95_high": ("to", ".1f"),
    "seed_ci95_low": ("95 % seeds, from", ".1f"), "seed_ci95_high": ("to", ".1f"),
    "failure_kinds": ("failed", ""), "chance_seeds": ("at chance", "d"), "class_prior": ("prior %", ".1f"),
    "published": ("published", ".2f"), "gap": ("gap", "+.2f"), "published_certainty": ("certainty", ""),
    "parameters": ("parameters", ""), "steps_per_s": ("steps/s", ".2f"), "peak_mem_mib": ("MiB", ",.0f"),
    "last_accuracy_mean": ("last step %", ".2f"), "selected_on": ("selected on", ""), "impl": ("impl", ""),
    "precision": ("precision", ""), "protocol": ("protocol", ""), "budget": ("budget", ""), "device": ("device", ""),
    "data_digest": ("data", ""), "overrides": ("overrides", ""), "code": ("code", ""),
    "published_source": ("published in", ""), "published_setting": ("published setting", ""),
}  # fmt: skip

EFFICIENCY: Columns = {
    "attention": ("attention", ""), "length": ("length", ",d"), "heads": ("H", "d"), "head_dim": ("D", "d"),
    "masked": ("mask", ""), "tokens": ("tokens", ",d"), "batch": ("batch", "d"), "fwd_ms": ("forward ms", ".4g"),
    "fwd_bwd_ms": ("forward + backward ms", ".4g"), "peak_mem_mib": ("MiB", ",.1f"),
    "fwd_ratio": ("forward / softmax", ".3f"), "time_ratio": ("time / softmax", ".3f"),
    "memory_ratio": ("memory / softmax", ".3f"), "bandwidth_fraction": ("share of bandwidth", ".3f"),
    "impl": ("impl", ""), "timing": ("timing", ""), "status": ("status", ""), "message": ("message", ""),
    "settings": ("settings", ""), "dtype": ("dtype", ""), "device": ("device", ""), "code": ("code", ""),
}  # fmt: skip

STEPS: Columns = {
    "attention": ("attention", ""), "task": ("task", ""), "ms_per_step": ("ms a step", ".3f"),
    "floor_ratio": ("over none", ".2f"), "peak_mem_mib": ("MiB", ",.0f"), "n_seeds": ("seeds", "d"),
    "steps": ("steps", ",d"), "train_s": ("train s", ".1f"), "compile_s": ("compile s", ".1f"),
    "validate_s": ("validate s", ".1f"), "wall_s": ("wall s", ".1f"), "impl": ("impl", ""),
    "precision": ("precision", ""), "torch": ("torch", ""), "protocol": ("protocol", ""), "budget": ("budget", ""),
    "device": ("device", ""), "data_digest": ("data", ""),
}  # fmt: skip

DIGEST = 12
"""Digits of a digest that are shown."""

LONG = 40
"""A longer text is cut; pointing at it shows the whole."""


@dataclass(frozen=True)
class Table:
    """A table of the page and its title; `name` is that of its file without the ending."""

    name: str
    title: str
    frame: pd.DataFrame
    columns: Columns


def tables(made: Tables, measured: Mapping[str, pd.DataFrame]) -> list[Table]:
    """The tables that have a row; `measured` are those that are not of cells, by the name of their file."""
    leaderboard, summary, steps = made.leaderboard, made.summary, made.steps
    tasks = [c for c in summary.columns if summary[c].dtype == "float64" and c not in SUMMARY_LAST]
    every: Columns = {"attention": ("attention", ""), **{task: (task, ".2f") for task in tasks}, **SUMMARY_LAST}
    found = [
        Table("summary", "Summary: accuracy by task, per cent", summary, every),
        Table("leaderboard", "Leaderboard", leaderboard, LEADERBOARD),
        Table("steps", "Training speed", steps, STEPS),
    ]
    for name, rows in measured.items():
        if name == "efficiency":
            found.append(Table(name, "Speed and memory of a call", rows, EFFICIENCY))
        elif "protocol" in rows:
            title = f"Efficiency protocol {name.removeprefix('efficiency-')}"
            columns = {str(key): (str(key).replace("_", " "), _form(rows[key])) for key in rows}
            found.append(Table(name, title, rows, columns))
    return [table for table in found if len(table.frame)]


def _form(column: Any) -> str:
    return "" if not pd.api.types.is_numeric_dtype(column) else ",d" if column.dtype.kind == "i" else ".4g"


def render(table: Table) -> Markup:
    """`<table>` with a button in each heading, by which `page.js` sorts."""
    shown = {key: form for key, form in table.columns.items() if not _empty(table.frame[key])}
    numeric = {key for key in shown if pd.api.types.is_numeric_dtype(table.frame[key]) and key != "masked"}
    head = [
        tag("th", tag("button", heading, type="button"), scope="col", class_="number" if key in numeric else None)
        for key, (heading, _) in shown.items()
    ]
    rows = [
        tag("tr", *(_cell(key, row[key], form) for key, (_, form) in shown.items()))
        for row in table.frame.to_dict("records")
    ]
    body = join(tag("thead", tag("tr", *head)), Markup("\n"), tag("tbody", join(*rows, between="\n")))
    return tag("div", tag("table", body, id=table.name), class_="wide")


def _empty(column: Any) -> bool:
    return all(pd.isna(value) or value == "" for value in column)


def _cell(key: str, value: Any, form: str) -> Markup:
    if pd.isna(value) or value == "":
        return tag("td")
    if key == "masked":
        return tag("td", "yes" if value else "no")
    if form:
        number = int(value) if form.endswith("d") else float(value)
        return tag("td", f"{number:{form}}", class_="number", data_value=f"{number:.9g}")
    text = str(value)
    short = text[:DIGEST] if key == "data_digest" else text if len(text) <= LONG else f"{text[: LONG - 1]}…"
    return tag("td", short, title=None if short == text else text)


def count(table: Table, words: Sequence[str] = ("row", "rows")) -> str:
    """`7 rows`."""
    return f"{len(table.frame)} {words[len(table.frame) != 1]}"
