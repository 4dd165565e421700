"""Kernels compiled ahead of a run, by several processes at once: Triton keeps what they compile on disk."""

import itertools
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from lra.efficiency.calls import draw, inference, training
from lra.efficiency.cases import Case
from lra.efficiency.check import small
from lra.efficiency.measure import Run

MOST_WORKERS = 12
"""Each holds a context of its own on the device, about half a GB, and the driver makes one context after the other."""


def compile_ahead(groups: Sequence[Sequence[Case]], device: torch.device) -> int:
    """Run every case that has kernels of ours once in another process; returns the number of processes.

    What goes wrong there goes wrong again in the run, and is recorded there.
    """
    first, rest = waves(case for group in groups for case in group)
    workers = min(len(first), MOST_WORKERS, os.cpu_count() or 1)
    if device.type != "cuda" or workers < 2:
        return 0
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for wave in (first, rest):
                list(pool.map(_run_once, wave, itertools.repeat(str(device))))
    except BrokenProcessPool:
        pass
    return workers


def waves(cases: Iterable[Case]) -> tuple[list[Case], list[Case]]:
    """The cases that need kernels: of each attention and shape the first, then all others.

    Most kernels serve every length. The first case compiles them, and the others, each a task, what depends on theirs.
    """
    kinds: dict[tuple, list[Case]] = {}
    for case in cases:
        if "triton" in Run.builder(case)("auto").implementations:
            kinds.setdefault((case.attention, case.masked, case.heads, case.head_dim), []).append(case)
    return [some[0] for some in kinds.values()], [case for some in kinds.values() for case in some[1:]]


def _run_once(case: Case, device_name: str) -> None:
    """In a worker: the calls of a case, and the one that it is checked by."""
    device = torch.device(device_name)
    try:
        x = draw(case, device)
        module = Run.builder(case)("triton").to(device)
        for call in (training(module, draw(small(case), device)), inference(module, x), training(module, x)):
            call()
        torch.cuda.synchronize(device)
    except Exception:  # Triton's own are no RuntimeError
        return
