"""`report.html`: tables, pictures and cells in one file that needs nothing beside it and no network."""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files

import pandas as pd

from lra.figures.rows import Picture
from lra.page import cards, tables
from lra.page.markup import Markup, join, tag
from lra.report import Tables

TITLE = "Long Range Arena: results"

SVG_ID = re.compile(r'(\bid="|xlink:href="#|url\(#)')
"""Where a picture names one of its parts."""


def render(made: Tables, measured: Mapping[str, pd.DataFrame], pictures: Sequence[Picture]) -> str:
    """The page of all tables and records, with `pictures` in their order; the same bytes for the same input."""
    shown = tables.tables(made, measured)
    ok = sum(record["status"] == "ok" for record in made.records)
    failed = len(made.records) - ok
    counts = f"{ok} finished {'cell' if ok == 1 else 'cells'}, {failed} failed"
    sections = [
        tag("section", tag("h2", "Plots"), *map(_picture, range(len(pictures)), pictures), id="plots"),
        *(_table(table) for table in shown),
        _cells(made),
    ]
    problems = [tag("li", problem) for problem in made.problems]
    places = [("plots", "Plots"), *((table.name, table.title) for table in shown), ("cells", "Cells")]
    body = [
        tag("h1", TITLE),
        tag("nav", *(tag("a", title, href=f"#{name}") for name, title in places)),
        tag("p", f"{counts}. Accuracies in per cent. A missing value is empty. A * marks a row that overrides its "
                 "protocol. Click a heading to sort."),
        *([tag("section", tag("h2", "Problems"), tag("ul", *problems), id="problems")] if problems else []),
        *sections,
        tag("script", Markup(_asset("page.js"))),
    ]  # fmt: skip
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("link", rel="icon", href="data:,"),  # or a browser would ask for one
        tag("title", TITLE),
        tag("style", Markup(_asset("page.css"))),
    ]
    page = tag("html", tag("head", *head), Markup("\n"), tag("body", join(*body, between="\n")), lang="en")
    return f"<!doctype html>\n{page}\n"


def _picture(at: int, picture: Picture) -> Markup:
    svg = picture.path.with_suffix(".svg").read_text("utf-8")
    svg = svg[svg.index("<svg") :].rstrip()  # without the XML declaration
    svg = SVG_ID.sub(rf"\g<1>p{at}-", svg)  # pictures name their parts alike
    label = tag("title", picture.title)
    svg = re.sub(r"(<svg[^>]*)>", lambda head: f'{head[1]} role="img">{label}', svg, count=1)
    return tag("figure", Markup(svg), tag("figcaption", tag("b", picture.title), f". {picture.caption}"))


def _table(table: tables.Table) -> Markup:
    note = f"{tables.count(table)}; all columns in {table.name}.csv"
    return tag("section", tag("h2", table.title), tag("p", note), tables.render(table))


def _cells(made: Tables) -> Markup:
    filters = [
        tag("label", "show ", tag("input", type="search", id="filter", placeholder="attention, task, device …")),
        tag("label", tag("input", type="checkbox", id="failed"), " failed only"),
    ]
    everything = tag("div", cards.render(made.records), id="cards")
    return tag("section", tag("h2", "Cells"), tag("p", *filters), everything, id="cells")


def _asset(name: str) -> str:
    return "\n" + (files("lra") / "page" / name).read_text("utf-8")
