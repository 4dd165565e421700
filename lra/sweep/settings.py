"""What a group says once about its cluster: the keys of `conf/hydra/launcher/slurm.yaml`."""

from dataclasses import dataclass, field
from typing import Any

from lra.errors import UserError

SHORTEST_MINUTES = 5
"""submitit asks SLURM for a warning 90 s before the limit, which may come a minute earlier: a shorter job would hear it
while Python still starts, and die of it."""


@dataclass
class Settings:
    """The job that runs cells, and how many of each; the YAML file explains every key."""

    cluster: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    minutes: int = 240
    gpus: int = 1
    cpus: int = 4
    memory_gb: float = 32
    setup: list[str] = field(default_factory=list)
    cells_per_job: int = 1
    max_jobs: int = 1000
    parallel: int = 64
    max_timeouts: int = 20
    sbatch: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    wait: bool = True
    plan: bool = False

    def __post_init__(self) -> None:
        if self.cluster not in ("slurm", "local"):
            raise _impossible("cluster", self.cluster, "use slurm or local")
        for key in ("minutes", "cpus", "cells_per_job", "max_jobs", "parallel"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise _impossible(key, value, "it must be a positive integer")
        for key in ("gpus", "max_timeouts"):
            value = getattr(self, key)
            if type(value) is not int or value < 0:
                raise _impossible(key, value, "it must be an integer >= 0")
        if self.cluster == "slurm" and self.minutes < SHORTEST_MINUTES:
            allowed = f"SLURM warns a job up to 2.5 minutes before its end, it must be at least {SHORTEST_MINUTES}"
            raise _impossible("minutes", self.minutes, allowed)
        if not isinstance(self.memory_gb, int | float) or self.memory_gb <= 0:
            raise _impossible("memory_gb", self.memory_gb, "it must be a positive number")

    def slurm(self, job_name: str, pythonpath: str) -> dict[str, Any]:
        """The parameters of submitit's SLURM executor; `pythonpath` is where a node finds `lra`."""
        wanted = {key: getattr(self, key) for key in ("partition", "account", "qos", "constraint")}
        return {
            **{key: value for key, value in wanted.items() if value is not None},
            "job_name": job_name,
            "time": self.minutes,
            "cpus_per_task": self.cpus,
            "mem": f"{self.memory_gb:g}GB" if float(self.memory_gb).is_integer() else f"{int(1024 * self.memory_gb)}MB",
            **({"gpus_per_node": self.gpus} if self.gpus else {}),
            "array_parallelism": self.parallel,
            "setup": [*self.setup, f"export PYTHONPATH={pythonpath}${{PYTHONPATH:+:$PYTHONPATH}}"],
            "additional_parameters": {"requeue": True, **self.sbatch},
        }


def _impossible(key: str, value: Any, allowed: str) -> UserError:
    return UserError(f"hydra.launcher.{key}={value} is not possible; {allowed}")
