"""What a person sees of a multirun: one live overview in a terminal, one line an event in a log file."""

import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lra.record import Cell, Record

STEP = re.compile(rb": step (\d+)/(\d+)")
"""How a cell's log says where it is (`lra.progress`)."""

TAIL_BYTES = 4096
SHOWN = 16
"""Running cells that a terminal shows by name."""


@dataclass
class _Running:
    label: str
    log: Path
    started: float = field(default_factory=time.monotonic)
    first: int | None = None  # the step of the first line seen: a resumed cell does not start at 0

    def row(self) -> tuple[Text | ProgressBar, ...]:
        elapsed = time.monotonic() - self.started
        step, steps = step_of(self.log)
        if not steps:
            return Text(self.label), Text("starting"), Text(duration(elapsed)), Text("")
        if self.first is None:
            self.first = step if step < steps else 0
        left = elapsed * (steps - step) / (step - self.first) if step > self.first else None
        bar = ProgressBar(total=steps, completed=step, width=24)
        return Text(self.label), bar, Text(duration(elapsed)), Text("" if left is None else f"{duration(left)} left")


class Overview:
    """Counts of done, running and failed cells, an estimate of the time left, and where each running cell is.

    Entered around a multirun; `start` and `finish` may be called from several threads. The estimate is the mean time
    of the cells finished so far, over as many at a time as there are slots.
    """

    def __init__(self, console: Console, total: int, slots: int):
        self.console, self.total, self.slots = console, total, slots
        self.running: dict[str, _Running] = {}
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []
        self._lock = threading.Lock()
        self._live = Live(self, console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Overview":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def skip(self, cell: Cell, status: str, why: str) -> None:
        """A cell that is not run: what its record says, and why it stays."""
        with self._lock:
            self.statuses[status] += 1
            self._line(f"[{self.done}/{self.total}] {cell.label}: {status}, {why}")

    def start(self, cell: Cell, log: Path) -> None:
        with self._lock:
            self.running[cell.label] = _Running(cell.label, log)
            if self._live is None:
                self._line(f"{cell.label}: started")

    def finish(self, cell: Cell, record: Record) -> None:
        with self._lock:
            seconds = time.monotonic() - self.running.pop(cell.label).started
            self.seconds.append(seconds)
            self.statuses[record["status"]] += 1
            said = f" {message}" if (message := record.get("message")) else ""
            end = f"{record['status']}{said} ({duration(seconds)}){self.left()}"
            self._line(f"[{self.done}/{self.total}] {cell.label}: {end}")

    @property
    def done(self) -> int:
        return self.statuses.total()

    def left(self) -> str:
        """`, about 12 min left` once a cell has finished and others have not."""
        waiting = self.total - self.done
        if not self.seconds or not waiting:
            return ""
        mean = sum(self.seconds) / len(self.seconds)
        return f", about {duration(mean * -(-waiting // self.slots))} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            failed = self.done - self.statuses["ok"]
            counts = Text(f"{self.statuses['ok']} ok, ", style="bold")
            counts.append(f"{failed} failed", style="bold red" if failed else "bold")
            waiting = self.total - self.done - len(self.running)
            counts.append(f", {len(self.running)} running, {waiting} waiting{self.left()}")
            table = Table.grid(padding=(0, 2))
            for cell in list(self.running.values())[:SHOWN]:
                table.add_row(*cell.row())
        yield Group(counts, table)

    def _line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def step_of(log: Path) -> tuple[int, int]:
    """The step that a cell's log speaks of last, and of how many; (0, 0) before there is one."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            found = STEP.findall(file.read())
    except OSError:
        return 0, 0
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def duration(seconds: float) -> str:
    """A time as people say it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
