"""`scripts/efficiency.py --protocol NAME`: measure attentions as a paper did, one record a row."""

import argparse
import datetime
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import attention
from lra import provenance
from lra.efficiency import cases, paper_table, timing
from lra.efficiency.cases import BASELINE
from lra.efficiency.command import named_attentions
from lra.efficiency.measure import Run, WrongError
from lra.efficiency.papers import Case, Layer, Protocol, Step, approximation_error, load, names, training_step
from lra.errors import UserError
from lra.record import SCHEMA, Record

MEASURED = ("steps_per_s", "peak_mem_mib", "ms_per_instance", "mib_per_instance", "batch")
"""What a row keeps of softmax's, for its ratios."""

TIMED_CALLS = 10
LARGEST_BATCH = 4096

DESCRIPTION = """\
Measure attentions under the efficiency protocol of a paper, conf/efficiency/NAME.yaml, beside softmax (SDPA) in the
same run. Records lie below RESULTS_DIR/efficiency-protocols, the table is RESULTS_DIR/efficiency-NAME.csv."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 done, 1 where a row broke, 2 a mistake in the command, 130 interrupted."""
    request = parse(arguments)
    protocol: Protocol = request.protocol
    run = PaperRun(protocol, torch.device(request.device))
    code = 0
    try:
        for record in run.records(request.only, request.cases):
            paper_table.store(request.results_dir, record)
            print(line(record), flush=True)
            code = max(code, record["status"] in ("wrong", "error"))
    except KeyboardInterrupt:
        code = 130
    tables, problems = paper_table.refresh(request.results_dir)
    for text in (*tables, *(f"problem: {problem}" for problem in problems)):
        print(text)
    return code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The request; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser("scripts/efficiency.py", description=DESCRIPTION)
    add = parser.add_argument
    add("--protocol", required=True, metavar="NAME", help=f"of {', '.join(names())}")
    add("--only", type=named_attentions, default=attention.names(), metavar="NAME,…", help="attentions; default: all")
    add("--cases", metavar="CASE,…", help="of the protocol, as text-1024; default: all")
    add(
        "--batch", type=int, help="another batch, for a look on a small machine: the protocol is then named NAME-batchN"
    )
    add("--device", default="cuda", help="default: cuda; cpu for a look at small sizes")
    add("--results-dir", type=Path, default=Path("results"), help="default: results")
    request = parser.parse_args(arguments)
    try:
        request.protocol = load(request.protocol)
    except UserError as mistake:
        parser.error(str(mistake))
    known = {case.name: case for case in request.protocol.cases}
    wanted = request.cases.split(",") if request.cases else list(known)
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--cases {unknown[0]} is unknown; known: {', '.join(known)}")
    request.cases = [known[name] for name in wanted]
    if request.batch is not None:
        if request.batch < 1:
            parser.error(f"--batch {request.batch} is not possible; it must be a positive integer")
        request.protocol = replace(request.protocol, name=f"{request.protocol.name}-batch{request.batch}")
        request.cases = [replace(case, batch=request.batch) for case in request.cases]
    if request.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {request.device} is not here; --device cpu --batch 1 looks at the small cases")
    return request


@dataclass
class PaperRun:
    """The rows of one protocol on one device."""

    protocol: Protocol
    device: torch.device

    def __post_init__(self) -> None:
        self.precision = "bf16" if self.protocol.kind == "step" and self.device.type == "cuda" else "32"
        self.provenance = {
            "device": provenance.device_description(self.device),
            "code": provenance.code_revision(),
            "versions": provenance.versions(),
        }
        self.checks = Run(self.device)

    def records(self, only: Sequence[str], chosen: Sequence[Case]) -> Iterator[Record]:
        """Softmax first in every case, then the others in each of their settings; what goes wrong is a record too."""
        others = [name for name in only if name != BASELINE]
        for case in chosen:
            base: dict[str, Any] = {}
            for name in (BASELINE, *others):
                for options in self.protocol.options(name, case):
                    record = self.record(case, name, options, base)
                    if name == BASELINE and record["status"] == "ok":
                        base |= {key: record["row"][key] for key in MEASURED if key in record["row"]}
                    yield record

    def record(self, case: Case, name: str, options: dict[str, Any], base: dict[str, Any]) -> Record:
        defaults = attention.options(name)
        varied = {key for setting in self.protocol.settings.get(name, []) for key in setting}
        row: dict[str, Any] = {
            "protocol": self.protocol.name,
            "kind": self.protocol.kind,
            "attention": name,
            "task": case.task,
            "length": case.length,
            "batch": case.batch,
            "device": self.provenance["device"]["name"],
            "precision": self.precision,
            "settings": options,
            "changed": {key: options[key] for key in defaults if key in varied},
            "steps": self.protocol.steps,
            "published": self.protocol.published,
            "baseline": base,
        }
        outcome: dict[str, Any] = {"status": "ok", "message": ""}
        try:
            row["impl"] = self._impl(case, name)
            measure = self._step if self.protocol.kind == "step" else self._layer
            measure(row, case, name, options)
        except torch.OutOfMemoryError as error:
            outcome = {"status": "oom", "message": _first_line(error)}
        except WrongError as error:
            outcome = {"status": "wrong", "message": str(error)}
        except Exception as error:  # also Triton's own, which are no RuntimeError: the other rows go on
            outcome = {"status": "error", "message": _first_line(error)}
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        head = {"schema": SCHEMA, "kind": paper_table.KIND, **outcome}
        return {**head, "row": row, **self.provenance, "finished": finished}

    def _impl(self, case: Case, name: str) -> str:
        """The kernels where they take this shape, else the reference; WrongError where that is not right.

        Checked in bf16 whatever the precision: what is wrong is wrong by more than its rounding.
        """
        heads, dim = self.protocol.model["num_heads"], self.protocol.model["head_dim"]
        shape = cases.Case(name, case.length, heads, dim, tokens=case.length, masked=False)
        _, impl, checked, _ = self.checks.subject(shape)
        if not checked.passed:
            raise WrongError(f"{checked.where}: relative error {checked.error:.2e}, allowed {checked.allowed:.2e}")
        return impl

    def _step(self, row: dict[str, Any], case: Case, name: str, options: dict[str, Any]) -> None:
        """Steps a second, and the peak of weights, optimiser and activations together."""
        before = self._allocated()
        step = training_step(self.protocol, case, name, options, row["impl"], self.device)
        for _ in range(2):
            step()
        row["peak_mem_mib"] = self._peak(step, before)
        prepared = timing.prepare(step, self.device)
        (ms,) = timing.interleaved(prepared)
        row |= {"steps_per_s": 1000 / ms, "timing": prepared.how}

    def _layer(self, row: dict[str, Any], case: Case, name: str, options: dict[str, Any]) -> None:
        """Milliseconds and MiB an instance at the largest batch that fits, and the error against softmax."""

        def core(impl: str) -> attention.Attention:
            sizes = {key: self.protocol.model[key] for key in ("num_heads", "head_dim")}
            return attention.build(name, **sizes, max_length=case.length, impl=impl, **options)

        row["relative_error"] = approximation_error(core("reference"), case, self.device)
        before = self._allocated()
        layer = Layer(self.protocol, case, core(row["impl"]), self.device)
        batch = case.batch or self._largest(layer)
        call = layer.call(batch)
        call()
        times = [_once(call, self.device) / batch for _ in range(TIMED_CALLS)]
        row |= {"batch": batch, "timing": "clock"}
        row |= {"ms_per_instance": statistics.fmean(times), "ms_std": statistics.stdev(times)}
        peak = self._peak(call, before)
        row["mib_per_instance"] = None if peak is None else peak / batch

    def _largest(self, layer: Layer) -> int:
        """The largest power of two of sequences whose forward and backward fit."""
        batch = 1
        layer.call(batch)()
        while self.device.type == "cuda" and batch < LARGEST_BATCH:
            try:
                layer.call(2 * batch)()
            except torch.OutOfMemoryError:
                break
            batch *= 2
        self._empty()
        return batch

    def _allocated(self) -> int:
        self._empty()
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _empty(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _peak(self, call: Step, before: int) -> float | None:
        """MiB above `before` at the peak of a call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def line(record: Record) -> str:
    """One row on the screen."""
    row = paper_table.row_of(record)
    head = f"{row['protocol']} {row['attention']} {row['setting']}".strip()
    head = f"{head:<36} {row['task']}-{row['length']} batch {row['batch'] or '?'}"
    if record["status"] != "ok":
        return f"{head}  {record['status']}: {record['message']}"
    shown = [f"{name} {row[name]:.4g}" for name in paper_table.NUMBERS[record["row"]["kind"]] if row[name] is not None]
    return "  ".join([head, *shown])


def _once(call: Step, device: torch.device) -> float:
    """Milliseconds of one call, the device waited for on both sides, as the papers' profilers do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
