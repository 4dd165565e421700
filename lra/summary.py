"""The summary: one row an attention, one column a task, averages only over complete suites."""

from typing import Any, cast

import pandas as pd

SCOPE = ["protocol", "budget", "device"]
"""What a row, an average and a rank never mix, beside the data."""

COUNTS = ["failures", "chance_seeds"]
"""Seeds that ended without a result, and finished ones that never left the class prior: shown, never dropped."""

ROW = ("attention", "protocol", "budget", "suite", "device")


def summary(leaderboard: pd.DataFrame, suites: dict[str, list[str]]) -> tuple[pd.DataFrame, list[str]]:
    """One row an (attention, protocol, budget, suite, device), from the leaderboard's rows; and problems found.

    Columns: `ROW`; every task of a suite (mean accuracy in per cent); `average` over the tasks of the row's suite and
    `mean_rank` over them (1 = most accurate, ties shared), both empty unless the row is complete; `failures`,
    `chance_seeds`; and `data_digests`. Only complete rows on the same data are ranked against each other, none alone.
    Where one attention has accuracies on two data sets of a task, none is chosen: the cell stays empty, and a problem
    says so.
    """
    rows, problems = _without_doubled_data(leaderboard)
    tasks = list(dict.fromkeys(task for names in suites.values() for task in names))
    numbers = dict.fromkeys([*tasks, "average", "mean_rank"], "float64")
    types = {
        **dict.fromkeys(ROW, "object"),
        **numbers,
        "failures": "int64",
        "chance_seeds": "int64",
        "data_digests": "object",
    }
    parts = [row for suite, names in suites.items() for row in _suite(rows, suite, names)]
    table = pd.DataFrame(parts, columns=list(types)).astype(types)
    keys = ["suite", "protocol", "budget", "device", "average", "attention"]
    return table.sort_values(by=keys, ascending=[key != "average" for key in keys], ignore_index=True), problems


def _suite(rows: pd.DataFrame, suite: str, tasks: list[str]) -> list[dict[str, Any]]:
    """The rows of one suite as dictionaries."""
    parts, scopes = [], cast(Any, rows[rows["task"].isin(tasks)].groupby(SCOPE))
    for scope, group in scopes:
        cells = group.pivot_table("accuracy_mean", "attention", "task", aggfunc="first", dropna=False)
        cells, data = cells.reindex(columns=tasks), _data(group)
        complete = cells.dropna()
        cells["average"] = complete.mean(axis=1)
        ranked = complete.groupby(data.reindex(complete.index))
        cells["mean_rank"] = ranked.rank(ascending=False).mean(axis=1).where(ranked.transform("size") > 1)
        cells[COUNTS] = group.groupby("attention")[COUNTS].sum()
        cells["data_digests"] = data
        fixed = {"suite": suite, **dict(zip(SCOPE, scope, strict=True))}
        parts += [{**fixed, **row} for row in cells.reset_index().to_dict("records")]
    return parts


def _data(rows: pd.DataFrame) -> pd.Series:
    """Attention to the data behind its accuracies: `listops:1f0c9e2b text:…`, tasks in alphabetical order."""
    labels: dict[str, list[str]] = {attention: [] for attention in rows["attention"]}
    present = rows[rows["accuracy_mean"].notna()]
    for attention, task, digest in sorted(
        zip(present["attention"], present["task"], present["data_digest"], strict=True)
    ):
        labels[attention].append(f"{task}:{digest}")
    return pd.Series({attention: " ".join(parts) for attention, parts in labels.items()}, dtype="object")


def _without_doubled_data(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows, without the accuracies of an attention on a task that it was run on several data sets of."""
    rows, problems = rows.copy(), []
    cells = cast(Any, rows[rows["n_seeds"] > 0].groupby(["attention", "task", *SCOPE]))
    for (attention, task, protocol, budget, device), group in cells:
        if len(group) > 1:
            rows.loc[group.index, "accuracy_mean"] = float("nan")
            problems.append(
                f"{attention} {task} {protocol} {budget} ({device}) was run on {len(group)} data sets, "
                f"{', '.join(sorted(group['data_digest']))}: the summary leaves it empty"
            )
    return rows, problems
