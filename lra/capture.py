"""One CUDA graph for a whole step, so that a launch costs what one kernel costs."""

from collections.abc import Callable
from typing import Any

import torch


class Captured:
    """A function without arguments or result, replayed as one CUDA graph from its fourth call on.

    What changes from call to call lies in tensors that the function reads, what it leaves behind in tensors that it
    writes in place. Every call counts: the first ones run eagerly, on a stream of their own as capture asks for, and
    in them everything happens that a graph cannot hold: compiling, tuning, creating the optimiser's state and an
    attention's first centroids. Random numbers stay random: a replay takes them from the device's generator, as
    seeded at that moment.

    pool   memory that several graphs share, which never run at the same time (`torch.cuda.graph_pool_handle`)
    """

    EAGER_CALLS = 3

    def __init__(self, function: Callable[[], None], pool: Any):
        self.function, self.pool = function, pool
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def ready(self) -> bool:
        """Whether a call is a replay."""
        return self.graph is not None

    def __call__(self) -> None:
        if self.graph is None and self.calls == self.EAGER_CALLS:
            self.graph = torch.cuda.CUDAGraph()
            # Calls of other threads, such as that which watches over NCCL, are no part of the graph, and no mistake.
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                self.function()
        if self.graph is not None:
            self.graph.replay()
            return
        self.calls += 1
        current, apart = torch.cuda.current_stream(), torch.cuda.Stream()
        apart.wait_stream(current)
        with torch.cuda.stream(apart):
            self.function()
        current.wait_stream(apart)
