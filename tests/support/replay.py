"""Results of a call from a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor


def replayed(step: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `step` returns, computed by a replay of its capture."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    return captured
