"""Which operators of PyTorch a call runs, forward and backward, and what it allocates, as the profiler sees them."""

import re
from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile

HEAVY = re.compile(
    r"aten::(matmul|mm|bmm|addmm|addbmm|baddbmm|addmv|mv|dot|linear|einsum"
    r"|_?(log_|safe_)?softmax\w*|logsumexp|_?scaled_dot_product\w*"
    r"|scatter\w*|index_add\w*|index_put\w*|_index_put\w*|index_reduce\w*|put_?|segment_reduce\w*"
    r"|topk|sort|argsort|kthvalue|msort|unique\w*)"
)
"""Matrix products, softmax, scatters and selections: what kernels of our own take the place of."""


def operators(call: Callable[[], object]) -> set[str]:
    """Names of all operators of PyTorch that `call` runs, in every thread: `aten::mm`, `lra::lln_forward`."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return {event.name for event in seen.events()}


def heavy_operators(call: Callable[[], object]) -> set[str]:
    """Those of `operators` that do the work of an attention."""
    return {name for name in operators(call) if HEAVY.fullmatch(name)}


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that `call` holds at once on the CPU, its result included, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        made = call()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))
    del made
    return max(held, default=0)
