"""Kernels compiled ahead of a run, by several processes at once: Triton keeps what they compile on disk."""

import itertools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from lra.efficiency.calls import draw, inference, training
from lra.efficiency.cases import BASELINE, Case
from lra.efficiency.measure import Run, WrongError

MOST_WORKERS = 12
"""Each holds a context of its own on the device, about half a GB."""


def compile_ahead(groups: Sequence[Sequence[Case]], device: torch.device) -> int:
    """Run every case that has kernels of ours once in another process; returns the number of processes.

    What goes wrong there goes wrong again in the run, and is recorded there.
    """
    every = [case for group in groups for case in group if case.attention != BASELINE]
    tasks = [list(some) for _, some in itertools.groupby(sorted(every, key=_kernels), key=_kernels)]
    workers = min(len(tasks), MOST_WORKERS, os.cpu_count() or 1)
    if device.type != "cuda" or workers < 2:
        return 0
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_run_once, tasks, itertools.repeat(str(device))))
    except BrokenProcessPool:
        pass
    return workers


def _kernels(case: Case) -> tuple:
    """What decides which kernels a case needs."""
    return case.masked, case.heads, case.head_dim, case.attention


def _run_once(some: Sequence[Case], device_name: str) -> None:
    """In a worker: the checks and calls of cases that share kernels."""
    device = torch.device(device_name)
    run = Run(device)
    try:
        for case in some:
            x = draw(case, device)
            module, impl, _, _ = run.subject(case)
            if impl != "triton":
                return
            for call in (inference(module, x), training(module, x)):
                call()
            torch.cuda.synchronize(device)
    except (RuntimeError, ValueError, WrongError):
        return
