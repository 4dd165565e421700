"""The summary: one row an attention, one column a task, averages only over complete suites."""

from typing import Any, cast

import pandas as pd

SCOPE = ["protocol", "budget", "device"]
"""What a row, an average and a rank never mix."""

ROW = ("attention", "protocol", "budget", "suite", "device")


def summary(leaderboard: pd.DataFrame, suites: dict[str, list[str]]) -> tuple[pd.DataFrame, list[str]]:
    """One row an (attention, protocol, budget, suite, device), from the leaderboard's rows; and problems found.

    Columns: `ROW`, every task of a suite (mean accuracy in per cent), `average` over the tasks of the suite,
    `mean_rank` over them (1 = most accurate, ties shared, among the rows complete in the suite), `failures`. Average
    and rank are empty unless the row is complete. Where a task was run on several data sets within `SCOPE`, its
    column stays empty there and a problem says so: those accuracies do not compare.
    """
    rows, problems = _without_mixed_data(leaderboard)
    tasks = list(dict.fromkeys(task for names in suites.values() for task in names))
    numbers = dict.fromkeys([*tasks, "average", "mean_rank"], "float64")
    types = {**dict.fromkeys(ROW, "object"), **numbers, "failures": "int64"}
    parts = [part for suite, names in suites.items() for part in _suite(rows, suite, names)]
    table = pd.DataFrame(parts, columns=list(types)).astype(types)
    keys = ["suite", "protocol", "budget", "device", "average", "attention"]
    return table.sort_values(by=keys, ascending=[key != "average" for key in keys], ignore_index=True), problems


def _suite(rows: pd.DataFrame, suite: str, tasks: list[str]) -> list[dict[str, Any]]:
    """The rows of one suite, by `SCOPE`, as dictionaries."""
    parts, scopes = [], cast(Any, rows[rows["task"].isin(tasks)].groupby(SCOPE))
    for scope, group in scopes:
        cells = group.pivot_table("accuracy_mean", "attention", "task", aggfunc="first", dropna=False)
        cells = cells.reindex(columns=tasks)
        complete = cells.dropna()
        cells["average"] = complete.mean(axis=1)
        cells["mean_rank"] = complete.rank(ascending=False, method="average").mean(axis=1)
        cells["failures"] = group.groupby("attention")["failures"].sum()
        fixed = {"suite": suite, **dict(zip(SCOPE, scope, strict=True))}
        parts += [{**fixed, **row} for row in cells.reset_index().to_dict("records")]
    return parts


def _without_mixed_data(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows, without the accuracies of tasks that were run on several data sets within one scope."""
    rows, problems = rows.copy(), []
    columns = cast(Any, rows[rows["n_seeds"] > 0].groupby([*SCOPE, "task"]))
    for (protocol, budget, device, task), group in columns:
        digests = sorted(group["data_digest"].unique())
        if len(digests) > 1:
            rows.loc[group.index, "accuracy_mean"] = float("nan")
            problems.append(
                f"summary: {task} was run on {len(digests)} data sets ({', '.join(digests)}) under protocol={protocol}, "
                f"budget={budget}, {device}; its column stays empty there"
            )
    return rows, problems
