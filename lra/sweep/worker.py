"""What a job of a sweep does on its node: its cells one after the other, each a process of its own."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import UncompletedJobError
from submitit.helpers import DelayedSubmission

from lra import provenance
from lra.launcher import CONTINUES, Job, keep, run_job
from lra.record import is_held, write_json
from lra.sweep.states import QUESTION_SECONDS

PATIENCE_SECONDS = 60.0
"""How long a job that has nothing else to do waits for cells that another process trains."""


@dataclass
class Pack:
    """Cells that one job runs. A requeued job goes on with the cell at which the last one stopped.

    `state` is the file in which it says where it is. What Triton and Inductor compile is shared by the cells, in a
    folder of the node that goes with the job: a network file system would be slow, and two architectures would clash.
    """

    jobs: list[Job]
    state: Path
    directory: Path
    code: str

    def __call__(self) -> list[str]:
        """Run the cells; how each ended."""
        os.chdir(self.directory)
        state = self._begin()
        cache = tempfile.mkdtemp(prefix="lra-compiled-", dir=os.environ.get("SLURM_TMPDIR"))
        environment = {
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            provenance.AT_SUBMISSION: self.code,
        }
        with _asked_to_end() as asked:
            try:
                for index in self._order(state, asked):
                    self._run(index, self.jobs[index], state, environment)
            finally:
                shutil.rmtree(cache, ignore_errors=True)
            again = asked.is_set() and _requeued()
        self._write(state | {"now": None, "over": not again, "stopped": asked.is_set()})
        return [state["ended"].get(str(index), "stopped") for index in range(len(self.jobs))]

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after a preemption or a time limit: the same; `state` knows what is done."""
        return DelayedSubmission(self)

    def _order(self, state: dict[str, Any], asked: threading.Event) -> Iterator[int]:
        """The cells that have not ended, until asked to end; those that another process trains come last."""
        held = []
        for index, job in enumerate(self.jobs):
            if asked.is_set():
                return
            if str(index) in state["ended"]:
                continue
            if is_held(job.directory):
                held.append(index)
            else:
                yield index
        end = time.monotonic() + PATIENCE_SECONDS
        for index in held:
            while is_held(self.jobs[index].directory) and time.monotonic() < end and not asked.wait(1):
                pass
            if asked.is_set():
                return
            yield index

    def _run(self, index: int, job: Job, state: dict[str, Any], environment: dict[str, str]) -> None:
        stored = job.stored
        if stored is not None and stored["status"] == "ok" and not job.config.afresh:
            state["ended"][str(index)] = "ok"  # another sweep has finished it meanwhile
            return
        if index in state["begun"]:  # in an earlier life of this job: it continues, even under rerun=true
            job.overrides = [override for override in job.overrides if not override.startswith("rerun=")]
        else:
            state["begun"].append(index)
        self._write(state | {"now": index})
        job.directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            status = run_job(job, environment=environment)["status"]
        except UncompletedJobError:  # submitit: one time limit too many
            keep(job, "timeout", "its job reached its time limit too often; the command continues it")
            raise
        if status not in CONTINUES:  # else the node may be going down: where the job is requeued, the cell continues
            state["ended"][str(index)] = status
        self._write(state)

    def _begin(self) -> dict[str, Any]:
        before: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(self.state.read_text())
        state = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "starts": before.get("starts", 0) + 1,
            "code": provenance.code_revision(),
            "begun": before.get("begun", []),
            "ended": before.get("ended", {}),
            "now": None,
            "over": False,
        }
        self._write(state)
        return state

    def _write(self, state: dict[str, Any]) -> None:
        write_json(self.state, state)


@contextlib.contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """Set when SIGTERM comes, which SLURM sends to a job and its cells before it kills them."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _requeued() -> bool:
    """Ask for this job to run again, unless SLURM ends it for good: whether it will.

    A job that `scancel` or its limit ends is no longer `RUNNING` when it hears of it. One that is preempted with a
    grace time is, and if it just ended early, SLURM would count it as completed.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    try:
        question = ["squeue", "--noheader", f"--jobs={job}", "--format=%i %T"]
        answer = subprocess.run(question, capture_output=True, text=True, timeout=QUESTION_SECONDS, check=True).stdout
        if answer.split()[1:] != ["RUNNING"]:
            return False
        asked = subprocess.run(["scontrol", "requeue", job], timeout=QUESTION_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return asked.returncode <= 0  # below: SLURM ends the job, and with it the program that asked
