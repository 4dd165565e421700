"""The page holds everything, needs nothing, and works in a real browser."""

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import MISSING, browser
from records import record, store

from lra.page import cards, page
from lra.page.markup import Markup, tag
from lra.publish import publish
from lra.record import Cell, Record
from lra.report import build
from lra.sweep.command import job_of

CURVE = [{"step": 50 * k, "validation_correct": 300 + 40 * k, "validation_total": 2000} for k in range(1, 9)]
POISON = '<script>alert("x")</script> & more'


def cells() -> list[Record]:
    made = [record(name, seed=k, correct=500 + 100 * k + at, curve=CURVE, wall_s={"train": 5.0})
            for at, name in enumerate(("softmax", "mra", "lln")) for k in range(2)]  # fmt: skip
    made.append(record("routing", seed=9, status="oom", message=POISON))
    return [*made, record("mra", seed=3, overrides={"attention.blocks_per_row": 16, "model.dim": 32}, starred=True)]


class Parts(HTMLParser):
    """Start tags with their attributes, and open elements that were never closed."""

    VOID = ("meta", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    store(folder, *cells())
    publish(folder)
    return folder


def test_the_page_is_whole_and_asks_for_nothing_outside_itself(results: Path) -> None:
    parts = Parts((results / "report.html").read_text())
    assert parts.open == []
    links = [value for _, given in parts.tags for key, value in given.items() if key in ("src", "href", "xlink:href")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not [name for name, _ in parts.tags if name in ("iframe", "object", "embed", "img")]


def test_every_picture_keeps_its_parts_apart_from_the_others(results: Path) -> None:
    parts = Parts((results / "report.html").read_text())
    names = [given["id"] for _, given in parts.tags if "id" in given]
    assert len(set(names)) == len(names)
    assert (
        sum(name == "svg" and "xmlns" in given for name, given in parts.tags) == len(list(results.rglob("*.svg"))) == 2
    )
    used = {given["xlink:href"][1:] for name, given in parts.tags if name == "use"}
    assert used <= set(names)


def test_what_a_record_says_is_text_never_markup(results: Path) -> None:
    text = (results / "report.html").read_text()
    assert POISON not in text
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; more" in text
    assert tag("p", "<b>", Markup("<i>"), title='"') == '<p title="&quot;">&lt;b&gt;<i></p>'


def test_every_cell_has_a_card_with_command_commit_device_status_and_curve(results: Path) -> None:
    text = (results / "report.html").read_text()
    assert text.count('class="card"') == len(cells())
    card = re.search(
        r'<details class="card" data-status="ok"><summary><span class="name">lln listops seed 1.*?</details>', text
    )
    assert card is not None
    for part in ("attention=lln task=listops protocol=small budget=published seed=1", "0123456789abcdef", "CPU",
                 "602 of 2,000 right", "checkpoint of step 90", "<polyline", "last 31.0 % at step 400"):  # fmt: skip
        assert part in card[0]
    failed = re.search(r'<details class="card" data-status="failed">.*?</details>', text)
    assert failed is not None
    assert ">oom<" in failed[0]
    assert "<polyline" not in failed[0]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention.rates": [8, 32, 128], "attention.gate": "top1_unscaled"},
        {"attention.compress": None, "model.dropout": 0.25},
        {"training.learning_rate": 3e-05, "trainer.precision": "bf16"},
    ],
)
def test_a_command_runs_the_same_cell_again(overrides: dict[str, Any]) -> None:
    cell = Cell("adamra", "listops", "small", "demo", 3, overrides)
    python, script, *arguments = shlex.split(cards.command(cell))
    assert (python, script) == ("python", "run.py")
    if None not in overrides.values():  # what an option does not take, its command does not either
        assert job_of(arguments).cell == cell


def test_text_that_hydra_would_read_otherwise_is_quoted() -> None:
    cell = Cell("mra", "listops", "small", "demo", 0, {"a": "it's, [x]", "b": True, "c": None, "d": ["x", 1.5]})
    assert shlex.split(cards.command(cell))[-4:] == [r"a='it\'s, [x]'", "b=true", "c=null", "d=[x,1.5]"]


def test_the_page_is_the_same_bytes_whatever_the_order() -> None:
    made = cells()
    assert page.render(build(made), {}, []) == page.render(build(made[::-1]), {}, [])


def test_a_picture_that_its_records_no_longer_give_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("plots/old.svg", "plots/old.png", "plots/notes.txt", "old.svg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    publish(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.read_text() == "old") == [
        "notes.txt", "old.svg"
    ]  # fmt: skip


def test_a_record_with_odd_details_has_a_card_all_the_same() -> None:
    curve = [{"step": 50}, 3, {"step": "x", "validation_correct": 1, "validation_total": 2}]
    odd = record(curve=curve, versions="3.11", wall_s=None, code=None)
    text = page.render(build([odd]), {}, [])
    assert text.count('class="card"') == 1
    assert "<polyline" not in text


def test_without_records_there_is_a_page() -> None:
    assert "0 finished cells, 0 failed" in page.render(build([]), {}, [])


@pytest.mark.skipif(bool(MISSING), reason=f"needs Debian's chromium and chromium-driver; missing: {', '.join(MISSING)}")
def test_a_browser_sorts_filters_and_finds_no_error(results: Path) -> None:
    column = "return [...document.querySelectorAll('#leaderboard tbody tr')].map((row) => row.cells[%d].textContent)"
    heading = "#leaderboard th:nth-child(%d) button"
    with browser() as window:
        window.open((results / "report.html").as_uri())
        headings = window.ask("return [...document.querySelectorAll('#leaderboard th')].map((th) => th.textContent)")
        accuracy = headings.index("accuracy %")
        window.click(heading % (accuracy + 1))
        assert window.ask(column % accuracy) == ["27.50", "27.55", "27.60", "35.00", ""]  # what is missing stays last
        window.click(heading % (accuracy + 1))
        assert window.ask(column % accuracy) == ["35.00", "27.60", "27.55", "27.50", ""]
        assert window.ask(f"return document.querySelectorAll('#leaderboard th')[{accuracy}].ariaSort") == "descending"
        window.click(heading % 1)
        assert window.ask(column % 0)[:3] == ["lln", "mra", "mra+4123ddd6*"]
        shown = "return [...document.querySelectorAll('.card')].filter((card) => card.checkVisibility()).length"
        assert window.ask(shown) == len(cells())
        window.type("#filter", "mra seed=1")
        assert window.ask(shown) == 1
        window.ask("document.getElementById('filter').value = ''")
        window.click("#failed")
        assert window.ask(shown) == 1
        assert window.console() == []
