"""Kernels compiled ahead of a run, by several processes at once: Triton keeps what they compile on disk."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from kernels.common.compilation import Variant, variants
from lra.efficiency.calls import Inputs, draw, inference, training
from lra.efficiency.cases import Case
from lra.efficiency.check import small
from lra.efficiency.measure import Run

MOST_WORKERS = 16
"""Each takes seconds of a core to start, as long as five or so kernels."""


def compile_ahead(groups: Sequence[Sequence[Case]], device: torch.device) -> int:
    """Compile every kernel that the cases launch, each once, in other processes; returns their number.

    What goes wrong there goes wrong again in the run, and is recorded there.
    """
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    if device.type != "cuda" or workers < 2:
        return 0
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for variant in needed(groups, device):
                pool.submit(variant.compile)
    except BrokenProcessPool:
        pass
    torch.cuda.empty_cache()
    return workers


def needed(groups: Sequence[Sequence[Case]], device: torch.device) -> Iterator[Variant]:
    """What the cases launch, each variant once; the longest lengths first, whose kernels take longest."""
    seen: set[tuple[str, str, str]] = set()
    for group in reversed(groups):
        x = draw(group[0], device)
        for case in group:
            for variant in _launched(case, x, device):
                if variant[:3] not in seen:
                    seen.add(variant[:3])
                    yield variant


def _launched(case: Case, x: Inputs, device: torch.device) -> list[Variant]:
    """By the calls of a case, and the one that it is checked by."""

    def calls() -> None:
        module = Run.builder(case)("triton").to(device)
        for call in (training(module, draw(small(case), device)), inference(module, x), training(module, x)):
            call()

    try:
        return variants(calls) if "triton" in Run.builder(case)("auto").implementations else []
    except Exception:  # Triton's own are no RuntimeError
        return []
