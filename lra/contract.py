"""`make check attention=mine`: one attention against the contract, and its time beside exact attention, in one verdict.

The tests are those of `tests/attention/test_contract.py`, which every registered attention passes, restricted to one.
"""

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import torch

import attention
from lra.efficiency import table
from lra.efficiency.cases import cases
from lra.efficiency.command import line
from lra.efficiency.measure import Run
from lra.errors import UserError
from lra.record import Record

TESTS = Path(__file__).parents[1] / "tests" / "attention" / "test_contract.py"

SIZES = {"cpu": ((256, 1024), 2048), "cuda": ((1024, 4096), 32_768)}
"""Lengths, and tokens of a call: small enough for a first look; `scripts/efficiency.py` measures in earnest."""

SHAPE = (2, 32)


@dataclass(eq=False)  # pytest wants its plugins hashable
class Outcome:
    """What pytest said of each test of one attention; a plugin of pytest that runs no other's."""

    attention: str
    passed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # name of the test → its last word

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [item for item in items if _about(item) == self.attention]

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.failed[report.nodeid] = _reason(report)

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            self.failed[name] = _reason(report)
        elif report.skipped:
            self.skipped.append(name)
        elif report.when == "call":
            self.passed.append(name)


def check(name: str, tests: Path = TESTS) -> int:
    """Run both and print what came out; 0 where the contract holds and every row is right, 1 otherwise.

    UserError for a name that is not registered.
    """
    if name not in attention.names():
        raise UserError(f"attention={name} is unknown; registered: {', '.join(attention.names())}")
    print(f"{name}: the contract, about a minute on a CPU", flush=True)
    outcome = contract(name, tests)
    for test, reason in outcome.failed.items():
        print(f"  failed  {test}\n          {reason}")
    skipped = f", {len(outcome.skipped)} skipped" if outcome.skipped else ""
    print(f"  {len(outcome.passed)} passed, {len(outcome.failed)} failed{skipped}", flush=True)
    records = rows(name)
    for record in records:
        print(f"  {line(record)}", flush=True)
    wrong = [record for record in records if record["status"] in ("wrong", "error")]
    if outcome.failed or wrong or not outcome.passed:
        reasons = [f"{len(outcome.failed)} of its tests"] if outcome.failed else []
        reasons += [f"{len(wrong)} measured calls"] if wrong else []
        reasons += [] if outcome.passed or outcome.failed else ["no test ran"]
        print(f"{name}: FAILED ({', '.join(reasons)})")
        return 1
    device = records[-1]["row"]["device"]
    print(f"{name}: PASSED; forward + backward over exact attention's on {device}: {ratios(records)}")
    return 0


def contract(name: str, tests: Path = TESTS) -> Outcome:
    """The outcome of the contract's tests for one attention, in this process."""
    try:
        import pytest
    except ImportError as error:
        raise UserError("the contract's tests need pytest: pip install -e '.[dev]'") from error
    outcome = Outcome(name)
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main([str(tests), "-q", "--import-mode=importlib", "-p", "no:cacheprovider"], plugins=[outcome])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        outcome.failed.setdefault(tests.name, f"pytest ended with {pytest.ExitCode(code).name}")
    return outcome


def rows(name: str) -> list[Record]:
    """Its records of forward and backward at small sizes, without a mask and with one; none is stored."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths, tokens = SIZES[device.type]
    run = Run(device)
    run.start()
    groups = cases([name], lengths, [SHAPE], (False, True), tokens)
    return [record for group in groups for record in run.group(group)]


def ratios(records: list[Record]) -> str:
    """`1.23 at N=256, 0.61 at N=1024` of the rows without a mask."""
    found = [table.row_of(record) for record in records if not record["row"]["masked"]]
    shown = [f"{row['time_ratio']:.2f} at N={row['length']}" for row in found if row["time_ratio"] is not None]
    return ", ".join(shown) or "not to be had"


def _about(item) -> str | None:
    """The attention that a test is about, if it is about one."""
    return item.callspec.params.get("name") if hasattr(item, "callspec") else None


def _reason(report) -> str:
    """The last line of a failure that says something: the assertion or the exception."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (str(crash.message if crash else report.longrepr).splitlines() or [report.outcome])[0]
