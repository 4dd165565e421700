"""How speed is measured: checked first, interleaved with the baseline, one record a row, no ratio without sense."""

import itertools
import runpy
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from efficiency import build, case, row_record

import attention
from lra.efficiency import baseline, compilation, picture, table, timing
from lra.efficiency.calls import draw, inference, suffix_padding, training
from lra.efficiency.cases import LENGTHS, Case, cases
from lra.efficiency.command import line, main
from lra.efficiency.measure import Run
from lra.efficiency.timing import Prepared

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


# What is measured


def test_the_settings_are_those_of_the_table():
    def options(name: str, length: int, heads: int = 2) -> dict:
        return Case(name, length, heads, 32, 131_072, masked=False).options

    assert [options("combiner", n)["segment_length"] for n in (1024, 4096, 16_384)] == [64, 64, 128]
    routing = [options("routing", n) for n in (1024, 4096, 16_384)]
    assert [(o["num_clusters"], o["window"]) for o in routing] == [(16, 64), (32, 128), (128, 128)]
    assert {(o["local_heads"], o["local_window"]) for o in routing} == {(1, 128)}
    assert all(options("routing", n)["num_clusters"] * options("routing", n)["window"] == n for n in LENGTHS)
    assert {options("mra", n)["blocks_per_row"] for n in LENGTHS} == {8}
    assert options("adamra", 1024)["rates"] == (2, 8, 32)
    assert options("lln", 1024)["statistics"] == "batch"
    for name in attention.names():
        attention.build(name, num_heads=2, head_dim=32, max_length=1024, **options(name, 1024))


def test_all_rows_of_a_group_share_shape_length_and_mask():
    groups = list(cases(["lln", "softmax"], [4096, 1024], [(2, 32), (8, 64)], [False, True]))
    assert len(groups) == 8
    assert all(len({(c.heads, c.head_dim, c.length, c.masked, c.batch) for c in group}) == 1 for group in groups)
    assert [(g[0].length, g[0].batch) for g in groups[:2]] == [(1024, 128), (4096, 32)]
    assert {c.tokens for g in groups for c in g if c.heads == 8} == {65_536}


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_a_quarter_of_a_masked_batch_is_padding(batch: int):
    mask = suffix_padding(batch, 1024, CPU)
    assert mask.float().mean().item() == pytest.approx(0.75, abs=0.001)
    assert (mask.sum(1) > 512).all()
    assert not (mask[:, 1:] & ~mask[:, :-1]).any(), "real tokens first"


def test_a_training_call_gives_all_gradients_and_the_auxiliary_loss_counts():
    module, x = build("adamra"), draw(case("adamra"), CPU, torch.float32)
    out, *gradients = training(module, x)()
    assert [g.shape for g in gradients] == [x.q.shape] * 3 + [module.router.shape]
    with_loss = gradients[3]
    module.balance_weight = 0.0
    assert not torch.equal(training(module, x)()[4], with_loss)
    (forward,) = inference(module, x)()
    assert torch.equal(forward, out)
    assert not forward.requires_grad


# Timing


def test_blocks_of_all_calls_take_turns(monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    monkeypatch.setattr(timing, "BLOCK_MS", 0.0)
    calls = [Prepared(lambda name=name: seen.append(name), "clock", CPU) for name in "ab"]
    times = timing.interleaved(*calls)
    assert "".join(seen[-2 * timing.ROUNDS :]) == "ab" * timing.ROUNDS
    assert all(0 <= ms < 1 for ms in times)


def test_a_slower_call_takes_longer():
    x = torch.randn(400, 400)
    quick, slow = (timing.prepare(lambda n=n: [x @ x for _ in range(n)], CPU) for n in (1, 20))
    times = timing.interleaved(quick, slow)
    assert times[1] > 4 * times[0]


# The baseline


def test_the_fastest_right_path_is_the_baseline_with_the_memory_of_the_leanest(monkeypatch: pytest.MonkeyPatch):
    class Slow(baseline.SDPA):
        def attend(self, q, k, v, key_mask):
            time.sleep(0.02)
            return super().attend(q, k, v, key_mask)

    class Refusing(baseline.SDPA):
        def attend(self, q, k, v, key_mask):
            raise TypeError("not for me\nfor several reasons")

    class Wrong(baseline.SDPA):
        def attend(self, q, k, v, key_mask):
            return 1.1 * super().attend(q, k, v, key_mask)

    kinds = {"slow": Slow, "refusing": Refusing, "wrong": Wrong, "plain": baseline.SDPA}
    monkeypatch.setattr(baseline, "build", lambda name, *sizes: kinds[name](name, *sizes))
    peaks = iter([98.0, 194.0])  # of the slow path and of the plain one
    monkeypatch.setattr(timing, "peak_memory", lambda call, device: next(peaks))
    best = Run(CPU).baseline(case("softmax", masked=True), draw(case(masked=True), CPU), list(kinds))
    assert best.settings == {"forward": "plain", "training": "plain"}
    assert best.refused["refusing"] == "not for me"
    assert best.refused["wrong"].startswith("output: relative error")
    assert best.refused.keys() == {"refusing", "wrong"}
    assert best.peak_mem_mib == 98.0


# Compiled ahead


def test_every_kernel_of_what_has_kernels_is_compiled_ahead_once(monkeypatch: pytest.MonkeyPatch):
    calls = itertools.count()
    monkeypatch.setattr(compilation, "variants", lambda call: [("", "", "all"), ("", "", str(next(calls)))])
    groups = list(cases(["linear", "lln", "mra"], [64, 128], [(2, 32)], [False], tokens=128))
    keys = [key for _, _, key, *_ in compilation.needed(groups, CPU)]
    assert keys == ["all", "0", "1", "2", "3"]


def test_what_goes_wrong_while_compiling_ahead_is_left_to_the_run(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(Run, "builder", lambda case: asked.append(case) or 1 / 0)
    assert list(compilation.needed([[case()]], CPU)) == []
    assert asked == [case()]


# Rows


def run() -> Run:
    made = Run(CPU)
    made.start()
    return made


def test_a_row_holds_its_settings_its_times_and_those_of_the_baseline_beside_it():
    group = [case("softmax"), case("adamra")]
    softmax, adamra = run().group(group)
    assert (softmax["status"], adamra["status"]) == ("ok", "ok")
    row = table.row_of(adamra)
    assert row["settings"].startswith("rates=[2,8,32] feature_map=exponential compress=mean")
    assert row["time_ratio"] == pytest.approx(row["fwd_bwd_ms"] / row["softmax_fwd_bwd_ms"])
    assert row["fwd_ratio"] == pytest.approx(row["fwd_ms"] / row["softmax_fwd_ms"])
    assert (row["impl"], row["timing"], row["peak_mem_mib"]) == ("reference", "clock", None)
    assert 0 < row["bandwidth_fraction"] < 1
    assert table.row_of(softmax)["time_ratio"] == 1
    assert {"code", "versions", "device", "finished"} <= adamra.keys()


def test_a_failed_check_leaves_no_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lra.efficiency.check.torch.finfo", lambda dtype: type("", (), {"eps": 1e-9}))
    monkeypatch.setattr(Run, "baseline", lambda *_: pytest.fail("not reached"))
    one = run()
    record = one._record(case("lln"), draw(case(), CPU), RuntimeError("no baseline here"))
    assert record["status"] == "wrong"
    row = table.row_of(record)
    assert all(row[name] is None for name in ("fwd_ms", "fwd_bwd_ms", "time_ratio", "bandwidth_fraction"))
    assert "relative error" in line(record)


def test_running_out_of_memory_is_an_outcome_and_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    prepare, made = timing.prepare, run()

    def scarce(call, device, warm_up=2):
        if call.__qualname__.startswith("training"):
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")
        return prepare(call, device)

    x = draw(case(), CPU)
    best = made.baseline(case("softmax"), x)
    monkeypatch.setattr(timing, "prepare", scarce)
    record = made._record(case("lln"), x, best)
    row = table.row_of(record)
    assert (row["status"], row["message"]) == ("oom", "CUDA out of memory.")
    assert row["fwd_ratio"] > 0
    assert row["fwd_bwd_ms"] is None
    assert "oom: CUDA out of memory." in line(record)
    (record,) = (made._record(case("softmax"), x, torch.OutOfMemoryError("no room")),)
    assert record["status"] == "oom"


def test_what_breaks_is_one_row(monkeypatch: pytest.MonkeyPatch):
    def broken(*_):
        raise RuntimeError("it broke\nin two lines")

    monkeypatch.setattr(type(build("linear")), "attend", broken)
    linear, lln = run().group([case("linear"), case("lln")])
    assert (linear["status"], linear["message"]) == ("error", "it broke")
    assert lln["status"] == "ok"


# Tables


def test_no_number_stands_beside_a_failed_check_even_if_a_record_has_one():
    row = table.row_of(row_record(passed=False, status="wrong"))
    assert row["fwd_bwd_ms"] is None
    assert row["time_ratio"] is None


def test_no_ratio_stands_beside_a_slow_baseline():
    good, slow = row_record(softmax_ms=0.65), row_record(softmax_ms=0.67)
    assert table.row_of(good)["time_ratio"] == pytest.approx(0.1 / 0.65)
    assert table.row_of(slow)["time_ratio"] is None
    assert table.row_of(slow)["fwd_bwd_ms"] == 0.1
    assert table.row_of(slow)["message"] == "softmax took 0.67 ms, known 0.6: no ratios"
    elsewhere = row_record(softmax_ms=0.67, device="NVIDIA L4")
    assert table.row_of(elsewhere)["time_ratio"] == pytest.approx(0.1 / 0.67)
    busy = row_record(length=2048, anchors={"4096": {"known_ms": 2.04, "measured_ms": 2.5}})
    assert table.row_of(busy)["time_ratio"] is None
    assert table.row_of(busy)["fwd_ratio"] is None


def test_the_bandwidth_fraction_is_of_eleven_passes():
    # 11 passes over 16.8 MB at 3 TB/s take 61.5 µs.
    assert table.row_of(row_record(fwd_bwd_ms=0.0615))["bandwidth_fraction"] == pytest.approx(1.0, rel=1e-3)


def test_slopes_are_of_one_sequence():
    linear = [row_record("lln", n, fwd_bwd_ms=0.1) for n in LENGTHS]  # as many tokens a call at every length
    exact = [row_record("softmax", n, fwd_bwd_ms=0.6 * n / 1024, peak_mem_mib=100.0) for n in LENGTHS]
    slopes = table.slopes(table.table([*linear, *exact])).set_index("attention")
    assert slopes.loc["lln", "time_slope"] == pytest.approx(1.0)
    assert slopes.loc["softmax", "time_slope"] == pytest.approx(2.0)
    assert slopes.loc["softmax", "memory_slope"] == pytest.approx(1.0)
    assert table.slopes(table.table(linear[:2]))["time_slope"].isna().all()


def test_tables_and_pictures_are_the_same_bytes_whatever_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = [row_record(name, n, masked=m) for name in ("lln", "mra") for n in LENGTHS for m in (False, True)]
    folders = tmp_path / "a", tmp_path / "b"
    for folder, order in zip(folders, (records, records[::-1]), strict=True):
        for record in order:
            table.store(folder, record)
        table.store(folder, records[0])  # a row measured again replaces itself
    monkeypatch.setattr(sys, "argv", ["report.py", str(folders[0])])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "scripts" / "report.py"), run_name="__main__")
    assert len(list(picture.draw(folders[1], table.refresh(folders[1])[0]))) == 1
    assert len(list((folders[0] / "plots").iterdir())) == 4  # with the published twin
    for name in ("efficiency.csv", *(path.relative_to(folders[1]) for path in (folders[1] / "plots").iterdir())):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert "efficiency.csv" in (folders[0] / "report.html").read_text()
    rows = pd.read_csv(tmp_path / "a" / "efficiency.csv")
    assert list(rows.columns) == list(table.COLUMNS)
    assert len(rows) == len(records)


def test_calls_of_another_size_are_rows_and_curves_of_their_own(tmp_path: Path):
    usual, small = row_record("lln", 1024), row_record("lln", 1024, tokens=2048, fwd_bwd_ms=0.01)
    paths = {table.store(tmp_path, record) for record in (usual, small)}
    assert {path.parts[-3] for path in paths} == {"h2-d32-bfloat16", "h2-d32-t2048-bfloat16"}
    frame, _ = table.refresh(tmp_path)
    assert frame["tokens"].to_list() == [2048, 131_072]
    assert len(list(picture.draw(tmp_path, frame))) == 2


def test_a_record_that_cannot_be_used_is_named_and_left_out(tmp_path: Path):
    path = table.store(tmp_path, row_record())
    path.with_name("n2048.json").write_text("{")
    path.with_name("n4096.json").write_text("[]")
    frame, problems = table.refresh(tmp_path)
    assert len(frame) == 1
    assert len(problems) == 2
    assert all("cannot be used" in problem for problem in problems)


def test_curves_need_only_what_was_measured(tmp_path: Path):
    records = [row_record("lln", 1024), row_record("mra", 1024, status="oom", fwd_bwd_ms=0.1, peak_mem_mib=None)]
    del records[1]["row"]["fwd_bwd_ms"]
    (made,) = picture.draw(tmp_path, table.table(records))
    assert made.path == tmp_path / "plots" / "efficiency-nvidia-h100-80gb-hbm3-h2-d32-bfloat16"
    assert list(picture.draw(tmp_path / "none", table.table(records[1:]))) == []


# The command

TINY = ["--device", "cpu", "--tokens", "128", "--shapes", "2x32", "--masks", "none"]


def test_a_run_leaves_records_a_table_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*TINY, "--only", "lln,none", "--lengths", "32,64,128", "--results-dir", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "efficiency.csv")
    assert sorted(set(rows["attention"])) == ["lln", "none", "softmax"]
    assert (rows["status"] == "ok").all()
    assert rows["device"].str.startswith("CPU").all()
    assert len(list((tmp_path / "efficiency").rglob("n*.json"))) == 9
    assert len(list(tmp_path.rglob("*.svg"))) == 1
    out = capsys.readouterr().out
    assert "lln (reference)" in out
    assert "time_slope" in out


def test_a_killed_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    group = Run.group

    def killed(self, cases):
        for at, record in enumerate(group(self, cases)):
            if at == 1:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(Run, "group", killed)
    assert main([*TINY, "--only", "lln,none", "--lengths", "32", "--results-dir", str(tmp_path)]) == 130
    assert len(pd.read_csv(tmp_path / "efficiency.csv")) == 1


def test_a_lost_device_ends_the_run_and_spoils_no_other_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(type(build("linear")), "attend", broken)
    monkeypatch.setattr(timing, "alive", lambda device: False)
    assert main([*TINY, "--only", "softmax,linear,lln", "--lengths", "32", "--results-dir", str(tmp_path)]) == 1
    rows = pd.read_csv(tmp_path / "efficiency.csv")
    assert dict(zip(rows["attention"], rows["status"], strict=True)) == {"softmax": "ok", "linear": "error"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lnl"], "argument --only: lnl is unknown; known: adamra, "),
        (["--lengths", "1024,0"], "argument --lengths: '0' is not possible; it must be a positive integer"),
        (["--shapes", "4x32"], "argument --shapes: 4x32 is unknown; known: 2x32, 8x64"),
        (["--masks", "causal"], "argument --masks: causal is unknown; known: none, padding"),
        ([], "--device cuda is not here; --device cpu --tokens 2048 --lengths 256,512 has a look"),
    ],
)
def test_a_mistake_ends_with_what_is_allowed(arguments: list[str], message: str, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
