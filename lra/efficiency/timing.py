"""Time on the device, and the memory of a call.

On a GPU a call is captured in a CUDA graph and the graph is replayed: launch gaps of Python neither hide nor fake a
difference. A call that cannot be captured runs as it is between two events. On a CPU a clock has to do.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lra.efficiency.calls import Call

BLOCK_MS = 5.0
"""Calls of one kind run back to back for about this long between two events, so that the events cost nothing."""

MOST_REPEATS = 200
ROUNDS = 7
FEW_ROUNDS = 3
"""Rounds of the interleaved blocks; few where one round already takes LONG_MS."""

LONG_MS = 30.0
COPY_BYTES = 1 << 30


@dataclass
class Prepared:
    """A call that is warm: how to run it, and how it runs ("graph", "events" or "clock").

    `call` is kept with a graph, because a replay reads what it closes over, at the same addresses; `made` is what a
    replay writes.
    """

    run: Callable[[], Any]
    how: str
    device: torch.device
    call: Call | None = None
    made: list[Tensor | None] | None = None


def prepare(call: Call, device: torch.device, warm_up: int = 2) -> Prepared:
    """Warm a call up and, on a GPU, capture it; OutOfMemoryError passes."""
    if device.type != "cuda":
        call()
        return Prepared(call, "clock", device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            made = call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it waits for the device, or allocates outside of the stream
        torch.cuda.synchronize(device)
        return Prepared(call, "events", device)
    return Prepared(graph.replay, "graph", device, call, made)


def block(prepared: Prepared, repeats: int) -> float:
    """Mean milliseconds of one call in `repeats` calls back to back."""
    if prepared.device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            prepared.run()
        return 1e3 * (time.perf_counter() - start) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        prepared.run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / repeats


def interleaved(*calls: Prepared) -> list[float]:
    """Median milliseconds of each call, from blocks of them in turn: what the card does meanwhile meets all alike."""
    estimates = [estimate(call) for call in calls]
    repeats = [min(MOST_REPEATS, max(1, math.ceil(BLOCK_MS / max(once, 1e-6)))) for once in estimates]
    one_round = sum(once * count for once, count in zip(estimates, repeats, strict=True))
    rounds = ROUNDS if one_round < LONG_MS else FEW_ROUNDS
    samples = [[block(call, count) for call, count in zip(calls, repeats, strict=True)] for _ in range(rounds)]
    return [statistics.median(times) for times in zip(*samples, strict=True)]


def estimate(call: Prepared) -> float:
    """Milliseconds of a call, roughly and quickly; a single hiccup does not count."""
    once = block(call, 1)
    return min(once, block(call, 3 if once < BLOCK_MS else 1))


def peak_memory(call: Call, device: torch.device) -> float | None:
    """MiB that one call takes at its peak beyond what was there before it, results included; None on a CPU.

    The call must be warm: the first one also allocates workspaces that stay.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    made = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del made
    return peak / 2**20


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written."""
    count = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 16
    source = torch.empty(count, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    (ms,) = interleaved(prepare(lambda: [target.copy_(source)], device))
    return 2 * count / ms / 1e6


def alive(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access, for one, it does not, until the process ends."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def agree(how: Sequence[str]) -> str:
    """One word for how several calls of a row were timed: the least exact of them."""
    return max(how, key=("graph", "events", "clock").index)
