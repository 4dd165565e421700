"""One run: for each group of cases a baseline, for each case a check, then time and memory, then a record."""

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import attention
from attention import Attention
from lra import provenance
from lra.efficiency import baseline, timing
from lra.efficiency.calls import Call, Inputs, draw, inference, training
from lra.efficiency.cases import BASELINE, Case
from lra.efficiency.check import Check, check
from lra.efficiency.timing import Prepared
from lra.record import SCHEMA, Record
from lra.seeding import seed_all

KIND = "efficiency"
HOPELESS = 2.0
"""A backend of the baseline that a first call shows to be slower than the fastest by this factor is not timed."""


class WrongError(Exception):
    """A module does not compute what it should; the message says what is wrong."""


@dataclass
class Baseline:
    """The fastest exact attention on the inputs of a group: its calls, and its time before any other's.

    Its memory is the least of any right path: the fastest with a mask leaves padding out, and takes twice as much for
    its copies, which must not make the others look lean.
    """

    forward: Prepared
    training: Prepared
    settings: dict[str, str]
    refused: dict[str, str]  # paths that do not take these inputs, and why
    fwd_ms: float
    fwd_bwd_ms: float
    peak_mem_mib: float | None
    check: Check


@dataclass
class Run:
    """What the rows of one run share: device, provenance, measured bandwidth, outcomes of checks."""

    device: torch.device
    bandwidth: float = 0.0  # GB/s of a copy
    anchors: dict[str, dict[str, float]] = field(default_factory=dict)
    checks: dict[tuple, Check] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Measure the card itself: how fast it copies, and whether the baseline is as fast as it is known to be."""
        self.provenance = {
            "device": provenance.device_description(self.device),
            "code": provenance.code_revision(),
            "versions": provenance.versions(),
        }
        self.bandwidth = timing.copy_bandwidth(self.device)
        for length, known in baseline.anchors(self.device_name).items():
            case = Case(BASELINE, length, *baseline.ANCHOR_SHAPE, baseline.ANCHOR_TOKENS, masked=False)
            best = self.baseline(case, draw(case, self.device))
            self.anchors[str(length)] = {"known_ms": known, "measured_ms": best.fwd_bwd_ms}

    @property
    def device_name(self) -> str:
        return self.provenance["device"]["name"]

    # The baseline

    def baseline(self, case: Case, x: Inputs, paths: Sequence[str] | None = None) -> Baseline:
        """The fastest exact path for the group of `case`, forward and training each, of all or of those named.

        WrongError if none is right. OutOfMemoryError passes.
        """
        right, refused = {}, {}
        for name in paths or baseline.paths(self.device, case.masked):
            module = baseline.build(name, case.heads, case.head_dim, case.length)
            with baseline.quiet():
                try:
                    outcome = self._check(replace(case, attention=f"{BASELINE} {name}"), module, exact=BASELINE)
                    if outcome.passed:
                        training(module, x)()
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # SDPA or a compiler says no, each in its own words
                    refused[name] = _first_line(error)
                    continue
            if outcome.passed:
                right[name] = (module, outcome)
            else:
                refused[name] = f"{outcome.where}: relative error {outcome.error:.2e}"
        if not right:
            raise WrongError(f"no exact attention takes these inputs and is right: {refused}")
        calls = {name: training(module, x) for name, (module, _) in right.items()}
        train_name, trained, fwd_bwd_ms = self._fastest(calls)
        peaks = [timing.peak_memory(call, self.device) for call in calls.values()]
        peak = min((mib for mib in peaks if mib is not None), default=None)
        name, forward, fwd_ms = self._fastest({name: inference(module, x) for name, (module, _) in right.items()})
        settings = {"forward": name, "training": train_name}
        return Baseline(forward, trained, settings, refused, fwd_ms, fwd_bwd_ms, peak, right[train_name][1])

    def _fastest(self, calls: dict[str, Call]) -> tuple[str, Prepared, float]:
        how = "events" if self.device.type == "cuda" else "clock"
        first = {}
        for name, call in calls.items():
            call()
            first[name] = timing.estimate(Prepared(call, how, self.device))
        hopeful = [name for name, ms in first.items() if ms <= HOPELESS * min(first.values())]
        prepared = {name: timing.prepare(calls[name], self.device) for name in hopeful}
        times = dict(zip(prepared, timing.interleaved(*prepared.values()), strict=True))
        best = min(times, key=lambda name: times[name])
        return best, prepared[best], times[best]

    # Rows

    def group(self, cases: Sequence[Case]) -> Iterator[Record]:
        """The records of cases that share shape, length and mask, in turn; whatever goes wrong is a record too."""
        x = draw(cases[0], self.device)
        try:
            best: Baseline | Exception = self.baseline(cases[0], x)
        except (WrongError, torch.OutOfMemoryError) as error:
            best = error
        for case in cases:
            yield self._record(case, x, best)

    def _record(self, case: Case, x: Inputs, best: Baseline | Exception) -> Record:
        row: dict[str, Any] = {
            **asdict(case),
            "batch": case.batch,
            "device": self.device_name,
            "copy_gb_per_s": self.bandwidth,
            "settings": case.options,
        }
        outcome: dict[str, Any] = {"status": "ok", "message": ""}
        try:
            if case.attention == BASELINE:
                _fill_baseline(row, outcome, best)
            else:
                self._fill(row, outcome, case, x, best if isinstance(best, Baseline) else None)
        except torch.OutOfMemoryError as error:
            outcome |= {"status": "oom", "message": _first_line(error)}
        except WrongError as error:
            outcome |= {"status": "wrong", "message": str(error)}
        except Exception as error:  # also Triton's own, which are no RuntimeError: the other rows go on
            outcome |= {"status": "error", "message": _first_line(error)}
        if isinstance(best, Baseline):
            about = {"refused": best.refused, "peak_mem_mib": best.peak_mem_mib}
            row["baseline"] = {**best.settings, **about, **row.get("baseline", {})}
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        head = {"schema": SCHEMA, "kind": KIND, **outcome}
        return {**head, "row": row, "anchors": self.anchors, **self.provenance, "finished": finished}

    def _fill(self, row: dict[str, Any], outcome: dict[str, Any], case: Case, x: Inputs, best: Baseline | None) -> None:
        """Measure one attention; numbers enter the row as they are found, so that running out of memory keeps some."""
        module, impl, checked, refusal = self.subject(case)
        outcome |= {"message": refusal, "check": checked.to_dict()}
        row |= {"impl": impl, "baseline": {}}
        if not checked.passed:
            raise WrongError(f"{checked.where}: relative error {checked.error:.2e}, allowed {checked.allowed:.2e}")
        how = []
        for name, make in (("fwd", inference), ("fwd_bwd", training)):
            prepared = timing.prepare(make(module, x), self.device)
            how.append(prepared.how)
            against = None if best is None else best.forward if name == "fwd" else best.training
            times = timing.interleaved(prepared, *([against] if against else []))
            row[f"{name}_ms"] = times[0]
            if against:
                row["baseline"][f"{name}_ms"] = times[1]
            row["timing"] = timing.agree(how)
            if prepared.made is not None and not _finite(prepared.made):
                del row[f"{name}_ms"]
                raise WrongError(f"{name} of the measured call is not finite")
            del prepared
        row["peak_mem_mib"] = timing.peak_memory(training(module, x), self.device)

    def subject(self, case: Case) -> tuple[Attention, str, Check, str]:
        """The module of a case on the device, through the kernels where there are any, checked; and their refusal."""
        refusal = ""
        build = self.builder(case)
        known = build("auto").implementations
        for impl in ("triton", "reference"):
            if impl not in known or (impl == "triton" and self.device.type != "cuda"):
                continue
            try:
                checked = self._check(case, build(impl).to(self.device), exact=case.attention)
                return build(impl).to(self.device), impl, checked, refusal
            except ValueError as error:
                if impl == "reference":
                    raise
                refusal = _first_line(error)
        raise ValueError(f"{case.attention} has no implementation for {self.device.type}")

    def _check(self, case: Case, module: Attention, exact: str) -> Check:
        """The outcome for this kind of case, found once a run: the check has a length of its own."""
        options = {} if exact == BASELINE else case.options
        key = (case.attention, repr(options), case.heads, case.head_dim, case.masked, case.dtype, module.impl)
        if key not in self.checks:
            plain = self.builder(replace(case, attention=exact))("reference" if exact != BASELINE else "auto")
            self.checks[key] = check(module, plain, case, self.device)
        return self.checks[key]

    @staticmethod
    def builder(case: Case) -> Callable[[str], Attention]:
        """Builds the attention of a case, always the same one, in the implementation named."""

        def build(impl: str) -> Attention:
            seed_all(0, "init")
            sizes = dict(num_heads=case.heads, head_dim=case.head_dim, max_length=case.length)
            return attention.build(case.attention, impl=impl, **sizes, **case.options)

        return build


def _fill_baseline(row: dict[str, Any], outcome: dict[str, Any], best: Baseline | Exception) -> None:
    if isinstance(best, Exception):
        raise best
    outcome["check"] = best.check.to_dict()
    row |= {
        "settings": best.settings,
        "impl": "varlen" if best.settings["training"] == baseline.VARLEN else "sdpa",
        "timing": timing.agree([best.forward.how, best.training.how]),
        "fwd_ms": best.fwd_ms,
        "fwd_bwd_ms": best.fwd_bwd_ms,
        "peak_mem_mib": best.peak_mem_mib,
        "baseline": {"fwd_ms": best.fwd_ms, "fwd_bwd_ms": best.fwd_bwd_ms},
    }


def _finite(made: list[Tensor | None]) -> bool:
    return all(bool(x.isfinite().all()) for x in made if x is not None)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
