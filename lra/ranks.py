"""Several devices for one cell: each rank trains on its part of a batch, one all-reduce joins their gradients."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterable

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import distributed
from torch.nn import Parameter

PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""


class OneAllReduce(DDPStrategy):
    """Lightning's DDP, its processes, devices and groups, without the wrapper around the module.

    The wrapper's hooks reduce gradients in buckets while Python walks through the backward pass; a CUDA graph does not
    hold them. It does hold one all-reduce of everything at the end (`average_gradients`), and for models of 0.4 M
    parameters that is faster, too.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is. All ranks begin alike: their weights follow from seed or checkpoint."""


def average_gradients(parameters: Iterable[Parameter]) -> None:
    """Replace every gradient by its mean over the ranks, with one all-reduce; nothing happens where there is one."""
    if not distributed.is_initialized():
        return
    trained = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for _, gradient in trained]) / distributed.get_world_size()
    distributed.all_reduce(flat)
    parts = flat.split([gradient.numel() for _, gradient in trained])
    for (parameter, _), part in zip(trained, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def rank_of_process(devices: int) -> int:
    """Which of the processes of a cell on so many devices this is: Lightning, which starts all but 0, says it here."""
    return int(os.environ.get("LOCAL_RANK", "0")) if devices > 1 else 0


def end_with_parent() -> None:
    """In another rank: be killed when rank 0, which started it, ends without a word, as by SIGKILL. Linux alone can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_helpers(trainer: Trainer) -> None:
    """In rank 0: end the other ranks, which may wait in a collective for ever."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        helpers = list(launcher.procs)
        launcher.procs.clear()  # Lightning watches them, and kills this process too when one of them dies
        for process in helpers:
            process.kill()
            process.wait()
