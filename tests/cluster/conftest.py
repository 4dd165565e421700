"""A real SLURM of one node on loopback, for tests: munged, slurmctld and slurmd, without root's systemd or cgroups.

Everything it writes lies in one temporary folder, it listens on free ports of 127.0.0.1, and it ends exactly the
processes that it started. It has no accounting database, as many clusters have none that users may ask.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweeps import until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
SYSTEM = ("/usr/sbin", "/sbin")
"""Where Debian has daemons, for a PATH without them."""

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its credential to expire: 5 s instead of two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdTimeout=300
KillWait=30
MinJobAge=300
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes={host} Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} PriorityTier=2
"""


class Cluster:
    """The three daemons; `stop_node` and `start_node` are what an operator does to a node."""

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname().partition(".")[0]
        self.configuration = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        self.processes: dict[str, subprocess.Popen] = {}
        self._configure()

    def start(self) -> None:
        munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._run("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge)
        until(lambda: (self.folder / "munge.socket").exists(), 20, self.said)
        self._run("slurmctld", "-D", "-c")
        self.start_node()

    def start_node(self) -> None:
        self._run("slurmd", "-D", "-N", self.host)
        until(lambda: self.ask("sinfo", "--noheader", "--format=%T") in ("idle", "mixed", "allocated"), 40, self.said)

    def stop_node(self) -> None:
        """The daemon alone: jobs on the node run on."""
        self._end("slurmd")

    def limit(self, job: str, minutes: int) -> None:
        """Change the time limit of a job that waits or runs."""
        self.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def stop(self) -> None:
        if "slurmctld" in self.processes:
            self.ask("scancel", "--user", getpass.getuser())
            with contextlib.suppress(AssertionError):  # the steps are children of no one here: SLURM ends them
                until(lambda: not self.ask("squeue", "--noheader"), 20)
        for name in ("slurmd", "slurmctld", "munged"):
            self._end(name)

    def ask(self, *command: str, seconds: float = 30) -> str:
        """What a command of SLURM says; empty where it fails."""
        how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": seconds, "check": False}
        answer = subprocess.run(command, env=self.environment, **how)
        return answer.stdout.strip()

    def said(self) -> str:
        """The last lines of every log, for a test that fails."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def _configure(self) -> None:
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        self.configuration.write_text(
            CONFIGURATION.format(
                host=self.host,
                ports=free_ports(2),
                user=getpass.getuser(),
                folder=self.folder,
                cores=os.cpu_count(),
                memory=memory // 2,
            )
        )

    def _run(self, program: str, *arguments: str) -> None:
        with open(self.folder / f"{program}.out.log", "ab") as out:
            command = [program, *arguments]
            self.processes[program] = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)

    def _end(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process is not None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A cluster whose commands this process and its children find; skips where there is none to be had."""
    path = os.pathsep.join([os.environ["PATH"], *SYSTEM])
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"no SLURM here ({missing[0]} is missing): apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="lra-slurm-"))  # short: a socket's path has 108 characters at most
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PATH", path)
        environment.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        cluster = Cluster(folder)
        try:
            try:
                cluster.start()
            except (AssertionError, OSError) as error:
                pytest.skip(f"SLURM does not start here: {error}")
            yield cluster
        finally:
            cluster.stop()
            shutil.rmtree(folder, ignore_errors=True)
