"""State of moment matching: on which tokens' statistics the scales α and β rest."""

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn

from kernels.common.inputs import check_choice
from kernels.lln.moments import match_moments

STATISTICS = ("batch", "running", "frozen")

SLOWEST_RATE = 0.01
"""A running average takes over 1/n of the n-th training call, but never less than this."""


class MomentMatching(nn.Module):
    """The scales (α, β) of a call from the spreads σ of queries and keys.

    statistics
        "batch"    σ of the call itself, in training and evaluation (the authors' code)
        "running"  training: σ of the call, of which a running average is kept; evaluation: that average
        "frozen"   always the stored σ. The first training call stores its own, for the calls after it; no later
                   call changes them. No output depends on another token through σ, so causal use is sound.

    Stored σ are 1 in a fresh module, and are saved under the same names in every mode: a model trained as
    "running" loads into one that is "frozen". Under data parallelism the σ of a call are those of a rank's part of the
    batch; what is stored is their mean over the ranks, the same on all.
    """

    sigma_query: Tensor
    sigma_key: Tensor
    calls: Tensor

    def __init__(self, constants: tuple[float, float], statistics: str, num_resolutions: int = 1):
        super().__init__()
        check_choice(STATISTICS, statistics=statistics)
        self.constants, self.statistics = constants, statistics
        self.register_buffer("sigma_query", torch.ones(num_resolutions))
        self.register_buffer("sigma_key", torch.ones(num_resolutions))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))  # training calls seen

    def forward(self, measure: Callable[[tuple[float, float]], tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """α and β, each (num_resolutions,).

        `measure` gives σq, σk, α, β of the call for the constants (a, b), and is asked only where it counts.
        """
        if self.statistics == "batch":
            _, _, alpha, beta = measure(self.constants)
            return alpha, beta
        scales = match_moments(self.sigma_query, self.sigma_key, self.constants)
        if not self.training:
            return scales
        sigma_query, sigma_key, alpha, beta = measure(self.constants)
        self._store(sigma_query, sigma_key)
        return (alpha, beta) if self.statistics == "running" else scales

    @torch.no_grad()
    def _store(self, sigma_query: Tensor, sigma_key: Tensor) -> None:
        if self.statistics == "frozen":
            rate = (self.calls == 0).to(self.sigma_key.dtype)
        else:
            rate = (1.0 / (self.calls + 1).to(self.sigma_key.dtype)).clamp(min=SLOWEST_RATE)
        # A tensor rate, not an `if`: the step never waits for the device and can be captured in a graph.
        both = torch.stack([sigma_query.to(self.sigma_query.dtype), sigma_key.to(self.sigma_key.dtype)])
        sigma_query, sigma_key = _mean_over_ranks(both).unbind()
        self.sigma_query.lerp_(sigma_query, rate)
        self.sigma_key.lerp_(sigma_key, rate)
        self.calls += 1

    def extra_repr(self) -> str:
        return f"statistics={self.statistics!r}"


def _mean_over_ranks(x: Tensor) -> Tensor:
    if not (distributed.is_available() and distributed.is_initialized()):
        return x
    mean = x / distributed.get_world_size()
    distributed.all_reduce(mean)
    return mean
