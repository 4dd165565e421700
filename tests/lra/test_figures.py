"""Pictures: the same bytes whatever the order, names that hide nothing, and nothing drawn that does not compare."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from records import record

from lra import literature
from lra.figures import accuracy, curves, error, protocols, published, rows, tradeoff
from lra.figures.labels import Label, label_ends, label_marks, spread
from lra.figures.style import DASHES, FAMILIES, OTHERS, looks, save, slug, style
from lra.record import Record
from lra.report import build

OFFLINE = ("listops", "pathfinder", "text_reviews", "image_fashion")
ALONE = {"name": "H100", "count": 1, "sharing": 1}
CURVE = [{"step": 50 * k, "validation_correct": 300 + 10 * k, "validation_total": 2000} for k in range(1, 5)]


def cell(attention: str, task: str = "listops", seed: int = 0, **changes: Any) -> Record:
    return record(attention, task, seed, **{"curve": CURVE, **changes}) | {"device": changes.get("device", ALONE)}


# The look of an attention


def test_every_family_has_one_colour_and_marker_in_every_picture() -> None:
    alone, among = looks(["mra_s"]), looks([*FAMILIES, "mra_s", "mra+1f0c9e2b*", "mine", "mra (blocks_per_row=4)"])
    assert alone["mra_s"] == among["mra_s"]
    assert len({(look.colour, look.marker) for look in among.values()}) == len(FAMILIES) + 1  # and one of others' own
    assert {among[name].colour for name in among if name.startswith("mra")} == {FAMILIES["mra"][0]}


@given(st.lists(st.sampled_from(["a", "b_c", "local", "lln", "lln+1", "lln+2", "lln_diag", "mra (x=1)", "mra+9*"])))
def test_no_two_forms_of_a_family_have_the_same_dashes(names: list[str]) -> None:
    found = looks(names)
    assert len({(look.colour, look.marker, look.place % len(DASHES)) for look in found.values()}) == len(set(names))


def test_colours_are_told_apart_by_the_colour_blind() -> None:
    """Viénot, Brettel and Mollon (1999): what protanopes and deuteranopes see of two colours, in linear RGB."""
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    colours = [
        np.array(mpl.colors.to_rgb(colour)) for colour in sorted({colour for colour, _ in (*FAMILIES.values(), OTHERS)})
    ]
    for seen in (np.eye(3), protan, deutan):
        seen_colours = [np.clip(seen @ colour**2.2, 0, 1) ** (1 / 2.2) for colour in colours]
        gaps = [np.abs(a - b).max() for i, a in enumerate(seen_colours) for b in seen_colours[:i]]
        assert min(gaps) > 0.09


# Names beside curves and marks


@given(st.lists(st.floats(0, 100), max_size=12), st.floats(0.5, 30))
def test_spread_keeps_the_order_the_gap_and_the_bounds(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap, 0, 100)
    gap = min(gap, 100 / max(1, len(wanted) - 1))
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in places)
    ordered = [place for _, _, place in sorted(zip(wanted, range(len(wanted)), places, strict=True))]
    assert all(b - a >= gap - 1e-6 for a, b in pairwise(ordered))


def test_spread_moves_only_what_must_move_and_as_little() -> None:
    assert spread([10, 50, 52, 90], 10, 0, 100) == [10, 46, 56, 90]


def boxes(figure: Figure) -> list[Any]:
    texts = [text for axes in figure.axes for text in axes.texts if text.get_text()]
    return [text.get_window_extent() for text in texts]


def test_names_of_curves_that_end_together_do_not_overlap() -> None:
    with style():
        figure = Figure(figsize=(4, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1])
        label_ends(figure, [(axes, [Label(1, 1 - 0.001 * k, f"name {k}", "black") for k in range(12)])])
        found = boxes(figure)
    assert len(found) == 12
    assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])
    assert all(box.x1 <= figure.bbox.x1 for box in found)


def test_names_of_crowded_marks_hide_no_name_and_no_mark() -> None:
    points = [(1 + 0.04 * k, 1 + 0.05 * (k % 3)) for k in range(9)]
    with style():
        figure = Figure(figsize=(4, 3), layout="constrained")
        axes = figure.subplots()
        axes.set(xlim=(0.5, 2), ylim=(0.5, 1.6))
        label_marks(figure, [(axes, [Label(*point, f"name {k}", "black") for k, point in enumerate(points)])])
        found, centres = boxes(figure), [axes.transData.transform(point) for point in points]
    assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])
    assert not any(box.contains(*centre) for box in found for centre in centres)


# What is drawn


def drawn(monkeypatch: pytest.MonkeyPatch, *records: Record) -> list[tuple[str, list[tradeoff.Panel]]]:
    """The panels of the trade-off plots of some records, not drawn."""
    found: list[Any] = []
    monkeypatch.setattr(tradeoff, "figure", lambda path, title, shown, known: found.append((path.name, shown)))
    tables = build(records)
    list(tradeoff.draw(Path(), tables.leaderboard, tables.summary, tables.records))
    return found


def test_the_trade_off_is_of_complete_suites_with_the_geometric_mean_of_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = dict(zip(OFFLINE, (10.0, 20.0, 40.0, 80.0), strict=True))
    made = [cell(name, task, correct=600 + 100 * k, steps_per_s=speeds[task], peak_mem_mib=100.0 + k)
            for name in ("mra", "lln") for k, task in enumerate(OFFLINE)]  # fmt: skip
    ((name, (panel,)),) = drawn(monkeypatch, *made)
    assert name == "tradeoff-small-published-h100"
    assert panel.title == "suite offline"
    assert [disc.name for disc in panel.discs] == ["lln", "mra"]
    assert panel.discs[0].speed == pytest.approx(10 * math.sqrt(8))
    assert (panel.discs[0].accuracy, panel.discs[0].memory) == (37.5, 103.0)
    ((_, shown),) = drawn(monkeypatch, *made, cell("softmax", steps_per_s=99.0))
    assert sorted(panel.title for panel in shown) == sorted(OFFLINE)
    assert [len(panel.discs) for panel in shown if panel.title == "listops"] == [3], "no row is left out"
    ((_, (panel,)),) = drawn(
        monkeypatch, *made, cell("lln", digest="turned", overrides={"task.drawing": "turned"}, starred=True)
    )
    assert panel.title == "suite offline", "but for experiments beside the table"


def test_without_a_complete_suite_there_is_a_panel_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [cell(name, task, steps_per_s=5.0) for name in ("mra", "lln") for task in OFFLINE[:2]]
    ((_, shown),) = drawn(monkeypatch, *made, cell("mra", digest="other"), cell("lln", digest="other"))
    assert [panel.title for panel in shown] == ["listops, data digest-o", "listops, data other", "pathfinder"]
    assert shown[0].discs[0].interval is not None


@pytest.mark.parametrize("device", [{**ALONE, "sharing": 5}, {"name": "H100", "count": 1}])
def test_the_speed_of_a_cell_that_shared_its_device_or_did_not_say_is_not_drawn(
    monkeypatch: pytest.MonkeyPatch, device: dict[str, Any]
) -> None:
    assert drawn(monkeypatch, cell("mra", device=device), cell("lln", device=device), cell("softmax")) == []
    (((_, (panel,))),) = drawn(
        monkeypatch, cell("mra"), cell("lln"), cell("mra", seed=1, device=device, steps_per_s=1.0)
    )
    assert {disc.name: disc.speed for disc in panel.discs} == {"lln": 4.0, "mra": 4.0}


def test_curves_are_of_finished_cells_by_row() -> None:
    nothing = [{"step": 50, "train_loss": 2.0}]
    made = [cell("mra"), cell("mra", seed=1), cell("lln", curve=nothing), record("softmax", status="nan", curve=CURVE)]
    ((key, curve),) = curves.curves_of(made).items()
    assert key[0] == "mra"
    assert curve == {50: [15.5, 15.5], 100: [16.0, 16.0], 150: [16.5, 16.5], 200: [17.0, 17.0]}


@pytest.mark.parametrize(
    ("changes", "marks"), [({}, 1), ({"budget": "demo"}, 0), ({"overrides": {"attention.x": 1}}, 0)]
)
def test_a_published_value_stands_only_beside_a_row_that_compares(changes: dict[str, Any], marks: int) -> None:
    ((_, shown),) = rows.scopes(build([cell("softmax", **changes)]).leaderboard)
    axes = Figure().subplots()
    accuracy._panel(axes, shown, looks(shown["name"]))
    assert sum(line.get_markerfacecolor() == "white" for line in axes.lines) == marks


@pytest.mark.parametrize(("prior", "drawn"), [(340, True), (10, False)])
def test_a_class_prior_far_from_every_row_is_said_and_does_not_crowd_them(prior: int, drawn: bool) -> None:
    ((_, shown),) = rows.scopes(build([cell("mra", correct=800), cell("lln", correct=820)]).leaderboard)
    axes = Figure().subplots()
    accuracy._panel(axes, shown.assign(class_prior=prior / 10), looks(shown["name"]))
    low, high = axes.get_xlim()
    assert (low < prior / 10) == drawn
    assert ("class prior" in axes.get_xlabel()) != drawn
    assert low < 40 < 41 < high


def test_a_row_is_called_by_what_it_overrides() -> None:
    assert rows.name_of("mra", "") == "mra"
    assert (
        rows.name_of("mra+1f0c9e2b*", '{"attention.rates":[2,8],"model.dim":32}') == "mra (rates=[2,8], model.dim=32)*"
    )
    long = '{"attention.feature_map":"softmax","attention.balance_weight":0.125}'
    assert rows.name_of("adamra+1f0c9e2b", long) == "adamra+1f0c9e2b"


def test_all_pictures_are_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    made = [cell(name, seed=k, correct=700 + 10 * k + at, steps_per_s=5.0 + at)
            for at, name in enumerate(("softmax", "mra", "mra_s")) for k in range(2)]  # fmt: skip
    made += [cell("lln", overrides={"model.dim": 32}, starred=True, peak_mem_mib=None), record("adamra", status="oom")]
    looked = pd.DataFrame(
        {"attention": ["softmax", "mra", "lln"], "setting": ["", "blocks_per_row=4", ""], "source": "Gaussian",
         "protocol": "small", "task": "listops", "layer": math.nan, "length": 512, "scale": 1.0, "device": "H100",
         "ms": [1.0, 0.5, 0.2], "relative_error": [1e-16, 0.3, 0.8]}
    )  # fmt: skip
    written = []
    for folder, order in ((tmp_path / "a", 1), (tmp_path / "b", -1)):
        tables = build(made[::order])
        pictures = [
            *tradeoff.draw(folder, tables.leaderboard, tables.summary, tables.records),
            *accuracy.draw(folder, tables.leaderboard),
            *curves.draw(folder, tables.leaderboard, tables.records),
            *error.draw(folder, looked[::order]),
        ]
        assert [picture.path.name for picture in pictures] == [
            *(f"{kind}-small-published-h100" for kind in ("tradeoff", "accuracy", "curves")), "error-h100"
        ]  # fmt: skip
        written.append({path.name: path.read_bytes() for path in (folder / "plots").iterdir()})
    assert len(written[0]) == 8
    assert written[0] == written[1]


def test_a_picture_holds_no_date_and_no_more_digits_than_can_be_seen(tmp_path: Path) -> None:
    with style():
        figure = Figure()
        figure.subplots().plot([1 / 3, 2 / 3], [0, 1 / 7])
        save(figure, tmp_path / "plot")
    text = (tmp_path / "plot.svg").read_text()
    assert "dc:date" not in text
    assert not [part for part in text.split() if part.startswith("L") and len(part.partition(".")[2]) > 2]
    assert slug("small", "CPU (x86_64, 2 threads)") == "small-cpu-x86_64-2-threads"


# The papers' protocols


def paper_rows(protocol: str, *rows: dict[str, Any]) -> pd.DataFrame:
    shared = {"protocol": protocol, "device": "H100", "precision": "bf16", "setting": ""}
    return pd.DataFrame([{**shared, **row} for row in rows])


def test_ratios_of_a_protocol_are_means_over_all_cases_or_none() -> None:
    made = paper_rows(
        "skyformer",
        {"attention": "lln", "task": "text", "length": 4096, "speed_ratio": 8.0, "memory_ratio": 0.5},
        {"attention": "lln", "task": "image", "length": 1024, "speed_ratio": 2.0, "memory_ratio": 0.125},
        {"attention": "mra", "task": "text", "length": 4096, "speed_ratio": 8.0, "memory_ratio": 0.5},
        {"attention": "mra", "task": "image", "length": 1024, "speed_ratio": None, "memory_ratio": None},
    )
    (mean,) = protocols.ratios(made, None)
    assert (mean.name, mean.speed, mean.memory) == ("lln", pytest.approx(4.0), pytest.approx(0.25))
    assert [row.name for row in protocols.ratios(made, 4096)] == ["lln", "mra"]


def test_error_is_drawn_where_it_is_no_rounding_and_its_points_are_named_once() -> None:
    made = paper_rows(
        "mra",
        {"attention": "softmax", "length": 512, "ms_per_instance": 1.0, "relative_error": 1e-16},
        {
            "attention": "mra",
            "length": 512,
            "ms_per_instance": 0.5,
            "relative_error": 0.1,
            "setting": "blocks_per_row=4",
        },
        {"attention": "mra", "length": 512, "ms_per_instance": None, "relative_error": 0.2},
    )
    assert [point[0] for point in error.points(made, "ms_per_instance")] == ["softmax", "mra"]
    assert error._names("mra", ["blocks_per_row=1", "blocks_per_row=4"]) == ["mra (blocks_per_row=1)", "4"]
    assert error._names("mra", ["", "blocks_per_row=4"]) == ["mra", "mra (blocks_per_row=4)"]
    assert not error.figure(Path("nowhere"), "", [error.Panel("", "", error.points(made[:1], "ms_per_instance"))])


def test_pictures_of_protocols_are_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    steps = [{"attention": name, "task": "text", "length": 4096, "speed_ratio": 1.0 + k, "memory_ratio": 1 / (1 + k)}
             for k, name in enumerate(("softmax", "lln", "mra"))]  # fmt: skip
    written = []
    for folder, order in ((tmp_path / "a", 1), (tmp_path / "b", -1)):
        (made,) = protocols.draw(folder, paper_rows("lra", *steps[::order]))
        assert made.path.name == "protocol-lra-h100-bf16"
        written.append([made.path.with_suffix(suffix).read_bytes() for suffix in (".svg", ".png")])
    assert written[0] == written[1]
    assert list(protocols.draw(tmp_path, paper_rows("lra", steps[0]))) == []


# What was published


def test_published_trade_offs_are_ratios_to_the_same_papers_transformer() -> None:
    (panel, other) = (published._panel(*entry) for entry in published.TRADEOFF)
    discs = {disc.name: disc for disc in panel.discs}
    assert (discs["Transformer"].speed, discs["Transformer"].memory, discs["Transformer"].accuracy) == (1, 1, 54.39)
    assert (discs["Performer"].speed, discs["Performer"].memory, discs["Performer"].accuracy) == pytest.approx(
        (5.7, 0.112, 51.41)
    )
    assert "TPU v3" in panel.title
    assert "V100" in other.title
    assert {disc.name: disc.speed for disc in other.discs}["Transformer (softmax)"] == pytest.approx(1)


def test_every_published_table_that_is_drawn_is_in_the_projects_copy() -> None:
    for title, table, metric, label in published.LENGTHS:
        panel = published._curves(title, table, metric, label)
        assert len(panel.curves) >= 5
        assert "{" not in panel.title
    assert {row.hardware for row in literature.efficiency("LRA-T2")} == {"4x4 TPU v3"}
