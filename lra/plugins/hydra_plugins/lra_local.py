"""The launcher of `hydra/launcher=local`. Hydra finds launchers only in packages named `hydra_plugins` on the path."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lra import launcher


class LocalLauncher(Launcher):
    """Runs the cells of a sweep as processes of their own, `per_gpu` at a time on each GPU, one at a time without.

    All cells are checked before the first one starts. A cell that fails leaves a record that says so, and the others
    go on; its output is in `seed<k>.log` beside its folder.
    """

    def __init__(self, per_gpu: int = 1, limit_minutes: float | None = None):
        self.per_gpu, self.limit_minutes = per_gpu, limit_minutes

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.base = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        jobs = launcher.check_jobs(self.context, self.base, job_overrides)
        launcher.launch(jobs, self.per_gpu, self.limit_minutes)
        return [JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED) for job in jobs]
