"""Which operators of PyTorch a call runs, forward and backward, as the profiler sees them."""

import re
from collections.abc import Callable

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
