"""The tables as people paste them: Markdown for a page, LaTeX (booktabs) for a paper; the CSV stays the source."""

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

LEADERBOARD = {
    "attention": "attention",
    "accuracy": "accuracy %",
    "seeds": "seeds",
    "failures": "failed",
    "chance": "at chance",
    "seed_ci95": "seeds interval",
    "test_ci95": "test interval",
    "published": "published",
    "certainty": "certainty",
    "gap": "gap",
    "steps_per_s": "steps/s",
    "peak_mem_mib": "MiB",
}
"""What a reader compares, and its heading; everything else stands in the CSV."""

ALWAYS = ("attention", "accuracy", "seeds")
"""Columns that stay though they be empty."""

STEPS = {
    "attention": ("attention", None),
    "ms_per_step": ("ms a step", 3),
    "floor_ratio": ("over none", 2),
    "lightning_overhead": ("Lightning %", 1),
    "peak_mem_mib": ("MiB", 0),
    "first_step_cold_s": ("first step cold, s", 1),
    "first_step_warm_s": ("first step warm, s", 1),
    "n_seeds": ("seeds", 0),
}
"""Columns of `steps.csv` that a reader compares, each with its heading and decimals; an empty one is left out."""

GROUP = ["protocol", "budget", "task", "device", "data_digest"]
"""A table of its own for each: what is in one table compares."""

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}
LATEX |= {"±": r"$\pm$", "×": r"$\times$", "–": "--"}


def markdown(leaderboard: pd.DataFrame, summary: pd.DataFrame, steps: pd.DataFrame | None = None) -> str:
    """The tables as one Markdown page: a section a suite, one a task, then one for the steps of each task."""
    parts = ["# Results"]
    for title, note, table in _sections(leaderboard, summary, steps):
        head = [_md(column) for column in table.columns]
        rule = ["---" if column == "attention" else "---:" for column in table.columns]
        rows = [[_md(value) for value in row] for row in table.itertuples(index=False)]
        lines = [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
        parts += [f"## {_md(title)}", _md(note), "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(leaderboard: pd.DataFrame, summary: pd.DataFrame, steps: pd.DataFrame | None = None) -> str:
    r"""The same as `table` environments to `\input`; they need `\usepackage{booktabs}`."""
    parts = [r"% Needs \usepackage{booktabs}."]
    for title, note, table in _sections(leaderboard, summary, steps):
        caption = f"{title}. {note}".removesuffix(" ").removesuffix(".") + "."
        rows = [" & ".join(_tex(value) for value in row) + r" \\" for row in table.itertuples(index=False)]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{_tex(caption)}}}",
                    rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
                    r"\toprule",
                    " & ".join(_tex(column) for column in table.columns) + r" \\",
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _sections(
    leaderboard: pd.DataFrame, summary: pd.DataFrame, steps: pd.DataFrame | None
) -> Iterable[tuple[str, str, pd.DataFrame]]:
    """Title, note and table of text cells, in the order of the CSV files."""
    for key, rows in summary.groupby(["suite", "protocol", "budget", "device"], sort=False, dropna=False):
        suite, protocol, budget, device = (str(part) for part in key)  # type: ignore[union-attr]
        yield f"Suite {suite}", _note(protocol, budget, device), _summary(rows)
    for key, rows in leaderboard.groupby(GROUP, sort=False, dropna=False):
        protocol, budget, task, device, digest = (str(part) for part in key)  # type: ignore[union-attr]
        yield task, _note(protocol, budget, device, digest), _leaderboard(rows)
    if steps is None:
        return
    for key, rows in steps.groupby([*GROUP, "precision", "torch"], sort=False, dropna=False):
        protocol, budget, task, device, digest, precision, torch = (str(part) for part in key)  # type: ignore[union-attr]
        note = _note(protocol, budget, device, digest)
        yield f"Training steps, {task}", f"{note}, {precision}, torch {torch}", _steps(rows)


def _note(protocol: str, budget: str, device: str, digest: str = "") -> str:
    data = f", data {digest[:12]}" if digest else ""
    return f"Protocol {protocol}, budget {budget}, {device or 'device unknown'}{data}"


def _summary(rows: pd.DataFrame) -> pd.DataFrame:
    tasks = [c for c in rows.columns if rows[c].dtype == "float64" and c not in ("average", "mean_rank")]
    shown = [task for task in tasks if any(rows[task].notna())]
    columns = {"attention": rows["attention"].astype(str)}
    columns |= {task: rows[task].map(_decimals(2)) for task in [*shown, "average", "mean_rank"]}
    columns["failed"] = rows["failures"].map(_count)
    if any(rows["chance_seeds"]):
        columns["at chance"] = rows["chance_seeds"].map(_count)
    return pd.DataFrame(columns).rename(columns={"mean_rank": "mean rank"})


def _leaderboard(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation in one cell, an interval in another; a column that is empty throughout is left out."""
    cells = [_cells(row) for row in rows.to_dict("records")]
    kept = [key for key in LEADERBOARD if key in ALWAYS or any(row[key] for row in cells)]
    return pd.DataFrame([[row[key] for key in kept] for row in cells], columns=[LEADERBOARD[key] for key in kept])


def _steps(rows: pd.DataFrame) -> pd.DataFrame:
    shares = rows.assign(lightning_overhead=100 * rows["lightning_overhead"])
    columns = {
        heading: shares[key].astype(str) if decimals is None else shares[key].map(_decimals(decimals))
        for key, (heading, decimals) in STEPS.items()
        if any(shares[key].notna())
    }
    return pd.DataFrame(columns)


def _cells(row: dict[Any, Any]) -> dict[str, str]:
    two, one = _decimals(2), _decimals(1)
    spread, intervals = two(row["accuracy_std"]), {}
    for name in ("seed_ci95", "test_ci95"):
        low, high = (one(row[f"{name}_{end}"]) for end in ("low", "high"))
        intervals[name] = f"{low} – {high}" if low else ""
    return {
        "attention": str(row["attention"]),
        "accuracy": two(row["accuracy_mean"]) + (f" ± {spread}" if spread else ""),
        "seeds": str(row["n_seeds"]),
        "failures": str(row["failure_kinds"]) if row["failures"] else "",
        "chance": "" if pd.isna(row["chance_seeds"]) else _count(row["chance_seeds"]),
        **intervals,
        "published": two(row["published"]),
        "certainty": "" if pd.isna(row["published_certainty"]) else str(row["published_certainty"]),
        "gap": "" if pd.isna(row["gap"]) else f"{row['gap']:+.2f}",
        "steps_per_s": two(row["steps_per_s"]),
        "peak_mem_mib": _decimals(0)(row["peak_mem_mib"]),
    }


def _decimals(count: int) -> Callable[[Any], str]:
    """A number with so many decimals; a missing one is empty, never zero."""
    return lambda value: "" if pd.isna(value) else f"{value:.{count}f}"


def _count(number: int) -> str:
    """A number of seeds; none is empty."""
    return str(number) if number else ""


def _md(text: str) -> str:
    for character in "\\|*_`":
        text = text.replace(character, f"\\{character}")
    return text


def _tex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
