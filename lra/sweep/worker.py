"""What a job of a sweep does on its node: its cells one after the other, each a process of its own."""

import contextlib
import datetime
import json
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

from lra import provenance
from lra.launcher import CONTINUES, Job, run_job
from lra.record import write_json


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
        try:
            for index, job in enumerate(self.jobs):
                if str(index) not in state["ended"]:
                    self._run(index, job, state, environment)
        finally:
            shutil.rmtree(cache, ignore_errors=True)
        self._write(state | {"now": None, "over": True})
        return [state["ended"].get(str(index), "stopped") for index in range(len(self.jobs))]

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after a preemption or a time limit: the same; `state` knows what is done."""
        return DelayedSubmission(self)

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
        status = run_job(job, environment=environment)["status"]
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
