"""How speed is measured: checked first, interleaved with the baseline, one record a row, no ratio without sense."""

import math
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from efficiency import row_record
from torch import Tensor

import attention
from attention import Attention
from lra.efficiency import baseline, compilation, picture, table, timing
from lra.efficiency.calls import draw, inference, suffix_padding, training
from lra.efficiency.cases import LENGTHS, Case, cases
from lra.efficiency.check import check
from lra.efficiency.command import line, main
from lra.efficiency.measure import Run
from lra.efficiency.timing import Prepared

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def case(name: str = "lln", length: int = 64, masked: bool = False, tokens: int = 128) -> Case:
    return Case(name, length, heads=2, head_dim=32, tokens=tokens, masked=masked)


def build(name: str, length: int = 64) -> Attention:
    return attention.build(name, num_heads=2, head_dim=32, max_length=length)


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


# Right before fast


class Off(Attention):
    """softmax, wrong by `factor` where `rows` says."""

    def __init__(self, factor: float, rows: slice = slice(None)):
        super().__init__(2, 32, 2048)
        self.inner, self.factor, self.rows = build("softmax", 2048), factor, rows

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        out = self.inner(q, k, v, key_mask)
        changed = torch.zeros_like(out)
        changed[:, :, self.rows] = 1.0
        return out * (1 + (self.factor - 1) * changed)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["lln", "mra", "adamra", "routing", "softmax"])
def test_a_right_module_passes(name: str, masked: bool):
    one = case(name, length=200, masked=masked)
    outcome = check(build(name, 200), build(name, 200), one, CPU)
    assert outcome.passed, outcome
    assert outcome.error > 0  # bf16 is no float64


@pytest.mark.parametrize(("factor", "rows"), [(1.02, slice(None)), (2.0, slice(-1, None)), (math.nan, slice(5, 6))])
def test_a_wrong_module_fails(factor: float, rows: slice):
    assert check(Off(1.0), Off(1.0), case("softmax", 200), CPU).passed
    outcome = check(Off(factor, rows), Off(1.0), case("softmax", 200), CPU)
    assert not outcome.passed


class WrongGradient(torch.autograd.Function):
    """x, whose gradient is 5 % too large."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 1.05 * gradient


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_wrong_gradient_fails(which: str):
    class Module(Off):
        def attend(self, q, k, v, key_mask):
            inputs = {"q": q, "k": k, "v": v}
            inputs[which] = WrongGradient.apply(inputs[which])
            return super().attend(*inputs.values(), key_mask)

    outcome = check(Module(1.0), Off(1.0), case("softmax", 200), CPU)
    assert not outcome.passed
    assert outcome.where == f"gradient of {which}"


def test_a_wrong_state_fails():
    class Module(type(build("routing"))):
        def _update(self, counts, sums):
            super()._update(2 * counts, sums)

    sizes = dict(num_heads=2, head_dim=32, max_length=200)
    exact = attention.build("routing", **sizes, decay=0.5)
    outcome = check(Module(**sizes, decay=0.5), exact, case("routing", 200), CPU)
    assert not outcome.passed
    same = check(*(attention.build("routing", **sizes, decay=0.5) for _ in range(2)), case("routing", 200), CPU)
    assert same.passed


# Selections first, then values on the same selection

NEAR = torch.finfo(torch.bfloat16).eps
CHOICES = {"routing": dict(num_clusters=8, window=20), "mra": dict(block_size=16, blocks_per_row=2)}


def choosing(name: str) -> Attention:
    return attention.build(name, num_heads=2, head_dim=32, max_length=200, **CHOICES[name])


def exchanging(name: str, change: Callable[[Tensor, Tensor], Tensor], tells: bool = True) -> Attention:
    """`name` that attends to what `change` makes of its selection and of the preference, and tells so or does not."""

    class Module(type(choosing(name))):
        def changed(self, *x: Any) -> Tensor:
            return change(super().select(*x), self.preference(*x))

        def select(self, *x: Any) -> Tensor | None:
            return self.changed(*x) if tells else None

        def attend(self, q, k, v, key_mask):
            self.selected = self.changed(q, k, key_mask)
            return super().attend(q, k, v, key_mask)

    return Module(num_heads=2, head_dim=32, max_length=200, **CHOICES[name])


def exchanged(own: Tensor, preference: Tensor, by: int) -> Tensor:
    """The worst selected candidate of each row exchanged for the one `by` places behind it."""
    order, last = preference.argsort(-1, descending=True), own.shape[-1] - 1
    return torch.cat([order[..., :last], order[..., [last + by]]], -1).sort(-1).values


def tied(own: Tensor, preference: Tensor) -> Tensor:
    """Exchanged for the next one where both are equal but for rounding."""
    other = exchanged(own, preference, by=1)
    found, best = (preference.gather(-1, index).sum(-1, keepdim=True) for index in (other, own))
    return other.where(best - found < NEAR, own)


@pytest.mark.parametrize("name", CHOICES)
def test_ties_may_go_to_either_and_values_are_compared_on_the_same_selection(name: str):
    assert check(exchanging(name, tied), choosing(name), case(name, 200), CPU).passed
    apart = check(exchanging(name, tied, tells=False), choosing(name), case(name, 200), CPU)
    assert not apart.passed, "on a selection of its own the exact one differs by more than rounding"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(
    "change",
    [
        lambda own, preference: exchanged(own, preference, by=30),
        lambda own, preference: exchanged(own, preference.masked_fill(preference == preference.amin(), 9.0), by=0),
        lambda own, preference: own[..., 1:],
        lambda own, preference: own[..., [0, *range(own.shape[-1] - 1)]],
        lambda own, preference: own + preference.shape[-1],
    ],
    ids=["worse", "worst", "too few", "twice", "nothing"],
)
def test_a_wrong_selection_is_refused_before_any_value(name: str, masked: bool, change):
    module = choosing(name)
    right = module.select
    module.select = lambda *x: change(right(*x), module.preference(*x))
    outcome = check(module, choosing(name), case(name, 200, masked), CPU)
    assert not outcome.passed
    assert outcome.where == "selection"


@pytest.mark.parametrize("name", CHOICES)
def test_a_wrong_value_on_a_right_selection_is_refused(name: str):
    module = choosing(name)
    attend = module.attend
    module.attend = lambda *x: 1.02 * attend(*x)
    outcome = check(module, choosing(name), case(name, 200), CPU)
    assert not outcome.passed
    assert outcome.where != "selection"


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


def test_only_what_has_kernels_is_compiled_ahead_and_one_case_of_each_kind_before_the_others():
    groups = cases(["linear", "lln", "mra", "softmax"], [1024, 2048, 4096], [(2, 32)], [False, True])
    first, rest = compilation.waves(one for group in groups for one in group)
    kinds = [(one.attention, one.masked) for one in first]
    assert kinds == [("lln", False), ("mra", False), ("lln", True), ("mra", True)]
    assert {one.length for one in first} == {1024}
    assert [(one.attention, one.masked, one.length) for one in rest] == [(*k, n) for k in kinds for n in (2048, 4096)]


def test_what_goes_wrong_while_compiling_ahead_is_left_to_the_run(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(Run, "builder", lambda case: asked.append(case) or 1 / 0)
    compilation._run_once(case(), "cpu")
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
    ],
)
def test_a_mistake_ends_with_what_is_allowed(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
