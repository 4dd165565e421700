"""The papers' own efficiency protocols: what they fix is kept, labelled, and in no other table."""

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import attention
from lra.efficiency import paper_run, paper_table, papers, table
from lra.efficiency.paper_run import PaperRun
from lra.errors import UserError
from lra.record import Record

CPU = torch.device("cpu")
SMALL = {"dim": 16, "num_heads": 2, "head_dim": 8, "ffn_dim": 8}
STEP = papers.Protocol(
    "tiny",
    "step",
    {**SMALL, "num_layers": 1, "dropout": 0.1, "embedding_rows": 9, "pooling": "mean_full", "patch": None},
    [papers.Case("text", 40, 2), papers.Case("retrieval", 24, 2, two_towers=True)],
    steps=3600,
)
LAYER = papers.Protocol(
    "one", "layer", SMALL, [papers.Case("layer", 64, logit_std=1.0)],
    settings={"mra": [{"blocks_per_row": 1}, {"blocks_per_row": 2}]},
)  # fmt: skip


def parsed(frame: pd.DataFrame) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.to_csv(frame))))


@pytest.fixture(scope="module")
def measured() -> list[Record]:
    return list(PaperRun(STEP, CPU).records(["lln"], STEP.cases))


# --- what the papers fix -----------------------------------------------------------------------------------------


def test_the_protocols_are_those_of_the_papers() -> None:
    assert papers.names() == ["lra", "mra", "skyformer"]
    lra, mra, skyformer = (papers.load(name) for name in papers.names())
    assert [(case.length, case.batch) for case in lra.cases] == [(n, 32) for n in (1024, 2048, 3072, 4096)]
    assert {case.task: case.batch for case in skyformer.cases} == {
        "text": 32, "listops": 32, "retrieval": 16, "pathfinder": 128, "image": 256,
    }  # fmt: skip
    assert skyformer.steps == 50_000
    assert [case.two_towers for case in skyformer.cases] == [case.task == "retrieval" for case in skyformer.cases]
    assert (mra.model["dim"], mra.model["num_heads"], mra.model["head_dim"], mra.model["ffn_dim"]) == (768, 12, 64, 2)
    for case, nats in zip(mra.cases, (3.02, 4.10), strict=True):
        assert case.batch is None
        assert case.logit_std**2 == pytest.approx(2 * (math.log(case.length) - nats), rel=0.01)


@pytest.mark.parametrize("name", papers.names())
def test_every_attention_has_a_setting_in_every_case(name: str) -> None:
    protocol = papers.load(name)
    for case in protocol.cases:
        for each in attention.names():
            for options in protocol.options(each, case):
                assert options.keys() == attention.options(each).keys()
    assert protocol.settings.keys() <= set(attention.names())


@pytest.mark.parametrize("name", [name for name in papers.names() if papers.load(name).kind == "step"])
def test_the_models_of_the_papers_take_a_step(name: str) -> None:
    """At a hundredth of their lengths."""
    protocol = papers.load(name)
    for case in protocol.cases:
        small = replace(case, length=case.length // 100, batch=1)
        step = papers.training_step(protocol, small, "none", {}, "auto", CPU)
        assert all(loss is not None and loss.isfinite().all() for loss in step())


def test_a_protocol_that_is_not_there_or_says_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--protocol nope is unknown; known: lra, mra, skyformer$"):
        papers.load("nope")
    (tmp_path / "odd.yaml").write_text("name: odd\nkind: step\nspeed: 3\n")
    with pytest.raises(UserError, match=r"odd.yaml: speed is not possible"):
        papers.load("odd", tmp_path)


# --- rows --------------------------------------------------------------------------------------------------------


def test_a_step_has_speed_hours_and_a_ratio_to_softmax_of_the_same_run(measured: list[Record]) -> None:
    assert [(record["row"]["attention"], record["row"]["task"]) for record in measured] == [
        ("softmax", "text"), ("lln", "text"), ("softmax", "retrieval"), ("lln", "retrieval"),
    ]  # fmt: skip
    assert {record["status"] for record in measured} == {"ok"}
    softmax, lln = (paper_table.row_of(record) for record in measured[:2])
    assert softmax["speed_ratio"] == 1.0
    assert lln["speed_ratio"] == lln["steps_per_s"] / softmax["steps_per_s"]
    assert lln["hours"] == pytest.approx(1 / lln["steps_per_s"])  # of 3,600 steps
    assert (lln["protocol"], lln["precision"], lln["impl"], lln["peak_mem_mib"]) == ("tiny", "32", "reference", None)


def test_a_step_learns() -> None:
    step = papers.training_step(STEP, STEP.cases[1], "lln", attention.options("lln"), "auto", CPU)
    losses = [float(torch.cat([loss for loss in step() if loss is not None]).mean()) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_layer_gives_a_point_for_each_setting_and_its_error_against_softmax() -> None:
    records = list(PaperRun(LAYER, CPU).records(["mra", "lln"], LAYER.cases))
    rows = parsed(paper_table.build(records))
    assert [(row["attention"], row["setting"]) for row in rows] == [
        ("lln", ""), ("mra", "blocks_per_row=1"), ("mra", "blocks_per_row=2"), ("softmax", ""),
    ]  # fmt: skip
    lln, one, two, softmax = rows
    assert float(softmax["relative_error"]) == 0.0
    assert float(two["relative_error"]) < 1e-12  # two blocks of 32 a row are the whole matrix of 64 tokens
    assert 1e-3 < float(one["relative_error"]) < 2
    assert float(lln["relative_error"]) > 1e-3
    assert all(float(row["ms_per_instance"]) > 0 for row in rows)
    assert float(softmax["time_ratio"]) == 1.0


def test_the_spread_of_the_logits_is_the_protocols() -> None:
    core = attention.build("none", num_heads=4, head_dim=16, max_length=256)
    seen = {}
    core.attend = lambda q, k, v, key_mask: seen.setdefault("logits", q @ k.mT / 4) is None or v  # type: ignore[method-assign]
    papers.approximation_error(core, papers.Case("layer", 256, logit_std=2.5), CPU)
    assert float(seen["logits"].std()) == pytest.approx(2.5, rel=0.05)


def test_what_breaks_is_a_row_too() -> None:
    broken = replace(STEP, model={**STEP.model, "pooling": "none"})
    (record,) = PaperRun(broken, CPU).records([], STEP.cases[:1])
    assert record["status"] == "error"
    assert "model.pooling=none" in paper_table.row_of(record)["message"]


def test_what_a_compiler_says_no_to_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class CompilationError(Exception):
        """As Triton's own: no RuntimeError."""

    def breaks(*_: Any) -> None:
        raise CompilationError("no such layout\nand more")

    monkeypatch.setattr(PaperRun, "_step", breaks)
    made = list(PaperRun(STEP, CPU).records(["none"], STEP.cases[:1]))
    assert [(record["status"], record["message"]) for record in made] == [("error", "no such layout")] * 2


# --- tables ------------------------------------------------------------------------------------------------------


def test_no_table_mixes_two_protocols_or_their_rows_with_others(measured: list[Record], tmp_path: Path) -> None:
    for name in ("tiny", "tiny-batch1"):
        for record in measured:
            paper_table.store(tmp_path, {**record, "row": {**record["row"], "protocol": name}})
    tables, problems = paper_table.refresh(tmp_path)
    assert problems == []
    assert [path.name for path in tables] == ["efficiency-tiny.csv", "efficiency-tiny-batch1.csv"]
    for path, frame in tables.items():
        assert len(frame) == len(measured)
        assert {f"efficiency-{name}.csv" for name in frame["protocol"]} == {path.name}
    assert table.read(tmp_path) == ([], [])
    again = {path: path.read_bytes() for path in tables}
    paper_table.refresh(tmp_path)
    assert again == {path: path.read_bytes() for path in tables}


def test_a_broken_record_is_a_problem_and_the_table_goes_on(measured: list[Record], tmp_path: Path) -> None:
    paper_table.store(tmp_path, measured[0])
    path = paper_table.store(tmp_path, measured[1])
    path.write_text(path.read_text()[:50])
    tables, problems = paper_table.refresh(tmp_path)
    assert [len(frame) for frame in tables.values()] == [1]
    assert len(problems) == 1
    assert "cannot be used" in problems[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--protocol", "nope"], "--protocol nope is unknown; known: lra, mra, skyformer"),
        (["--protocol", "lra", "--cases", "text-1"], "--cases text-1 is unknown; known: text-1024,"),
        (["--protocol", "lra", "--only", "nope"], "nope is unknown"),
        (["--protocol", "lra", "--batch", "0"], "--batch 0 is not possible"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(arguments: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        paper_run.parse([*arguments, "--device", "cpu"])
    assert end.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_another_batch_is_another_protocol() -> None:
    request = paper_run.parse(["--protocol", "lra", "--batch", "1", "--device", "cpu"])
    assert request.protocol.name == "lra-batch1"
    assert {case.batch for case in request.cases} == {1}
