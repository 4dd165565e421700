"""The launcher of `hydra/launcher=slurm`. Hydra finds launchers only in packages named `hydra_plugins` on the path."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lra import launcher
from lra.errors import UserError


class SlurmLauncher(Launcher):
    """Submits the cells of a sweep as an array of jobs; all cells are checked before. `conf/hydra/launcher/slurm.yaml`
    lists the settings, `python scripts/sweep.py` looks after the sweep afterwards."""

    def __init__(self, **settings: Any):
        self.settings: dict[str, Any] = {
            key: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value for key, value in settings.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.base = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            from lra.sweep import submission  # Hydra imports this file whichever launcher runs; few need submitit
        except ModuleNotFoundError as error:
            raise UserError("hydra/launcher=slurm needs submitit; pip install -e '.[cluster]'") from error
        from lra.sweep.settings import Settings

        settings = Settings(**self.settings)
        jobs = launcher.check_jobs(self.context, self.base, job_overrides)
        submission.launch(jobs, settings)
        return [JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED) for job in jobs]
