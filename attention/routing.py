"""Routing attention: softmax inside clusters that online k-means finds, beside local heads."""

from math import inf

import torch
from torch import Tensor, distributed

from attention.base import Attention
from attention.registry import register
from kernels.common.inputs import check_positive
from kernels.common.layout import compute_dtype
from kernels.routing.api import IMPLEMENTATIONS, coverage, move_centroids, preference, routing_attention, select
from kernels.routing.centroids import (
    cluster_scores,
    layer_norm,
    lloyd_centroids,
    sample_centroids,
    smoothed_counts,
    statistics,
    zero_padding,
)

LLOYD_STEPS = 10
INITS = ("lloyd", "paper")


@register("routing")
class RoutingAttention(Attention):
    """Routing Transformer attention (Roy, Saffar, Vaswani, Grangier, TACL 2021, arXiv 2003.05997).

    Each centroid takes the `window` nearest queries and the `window` nearest keys; softmax inside, averaged over the
    clusters of a query, zero for a query in none. Formulas: `kernels.routing.reference`. The local heads, the last
    ones, give every token its neighbourhood.

    num_clusters        centroids a routing head; the cost is num_clusters · window², the coverage
                        num_clusters · window tokens of N, with repetition
    window              members of a cluster; all tokens where there are fewer
    local_heads         heads that attend locally, below num_heads; None = half of them, rounded down
    local_window        block of a local head, which sees its own block and the neighbours
    commitment_weight   weight of the pull of q̂ and k̂ towards their centroids
    decay               λ of the running means
    init                "lloyd": a sample of the first training batch, moved by 10 Lloyd steps; until then as
                        "paper": normalised Gaussian vectors

    State, no parameters, all float32 whatever the inputs: `centroids` (H_r, K, D), `ema_counts` (H_r, K) and
    `ema_sums` (H_r, K, D), updated in place by every call in training mode, after its output:

        N <- λ N + (1-λ) counts,  M <- λ M + (1-λ) sums,  μ_c = M_c / N'_c

    over the real queries and keys of all ranks, where N' is N with a small floor. In evaluation nothing changes, and
    batch mates do not meet. Whether the init is done is a Python flag, saved as extra state, so that no step waits
    for the device. The first training call of "lloyd" must run before a CUDA graph is captured, since a captured
    init would begin anew at every replay: it is refused in one line. Calls after it, and all of "paper", can be
    captured, as long as the buffers are kept.

    Departures from the released code: padding is barred everywhere; logits are divided by √D, since normalised
    vectors make the unscaled ones almost one-hot; the mean over clusters is exact; queries and keys update the
    centroids together (the paper) and not in turn; N starts at one ("paper") or at the counts of the first batch
    ("lloyd") and not at zero; no relative positions and no extra mixing of heads.
    With `causal` the members are still chosen over the whole sequence, see `kernels.routing.api`.
    """

    implementations = IMPLEMENTATIONS
    centroids: Tensor
    ema_counts: Tensor
    ema_sums: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_length: int,
        causal: bool = False,
        impl: str = "auto",
        num_clusters: int = 16,
        window: int = 128,
        local_heads: int | None = None,
        local_window: int = 64,
        commitment_weight: float = 1e-4,
        decay: float = 0.999,
        init: str = "lloyd",
    ):
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        check_positive(num_clusters=num_clusters, window=window, local_window=local_window)
        local_heads = num_heads // 2 if local_heads is None else local_heads
        _check_options(num_heads, local_heads, commitment_weight, decay, init)
        self.window, self.local_window = window, local_window
        self.commitment_weight, self.decay = commitment_weight, decay
        self._initialised = init == "paper"
        centroids = layer_norm(torch.randn(num_heads - local_heads, num_clusters, head_dim))
        self.register_buffer("centroids", centroids)
        # The centroid counts as one observation of itself. From zero, as in the released code, the first call would
        # divide the sum of an empty cluster by almost nothing, and the commitment loss of the next by its square.
        self.register_buffer("ema_counts", torch.ones(centroids.shape[:2]))
        self.register_buffer("ema_sums", centroids.clone())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.training and not self._initialised:
            self._initialise(q, k, key_mask)
        out, commitment, counts, sums = routing_attention(
            q,
            k,
            v,
            self.centroids,
            window=self.window,
            local_window=self.local_window,
            key_mask=key_mask,
            causal=self.causal,
            impl=self.impl,
            members=self.selected,
        )
        self._auxiliary = self.commitment_weight * commitment
        if self.training:
            self._update(counts, sums)
        return out

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """The members of the clusters as the centroids are, see `kernels.routing.api.select`."""
        return select(q, k, self.centroids, window=self.window, key_mask=key_mask, impl=self.impl)

    def preference(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return preference(q, k, self.centroids, key_mask)

    @torch.no_grad()
    def _update(self, counts: Tensor, sums: Tensor) -> None:
        state = self.ema_counts, self.ema_sums, self.centroids
        move_centroids(*state, *_sum_over_ranks(counts, sums), decay=self.decay, impl=self.impl)

    @torch.no_grad()
    def _initialise(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> None:
        """Sample plus Lloyd steps; the running means start at the result, with the counts of its last step."""
        if q.is_cuda and _capturing():
            raise RuntimeError("routing with attention.init=lloyd needs one training call before a CUDA graph capture")
        heads, num_clusters, _ = self.centroids.shape
        tokens = torch.cat([q[:, :heads], k[:, :heads]]).to(compute_dtype(q.dtype))
        mask = None if key_mask is None else key_mask.repeat(2, 1)
        tokens = layer_norm(zero_padding(tokens, mask))  # (2B, H_r, N, D)
        centroids = _from_first_rank(sample_centroids(tokens, self.centroids.to(tokens), mask))
        counts = tokens.new_zeros(heads, num_clusters)
        for _ in range(LLOYD_STEPS):
            best = cluster_scores(tokens, centroids).argmax(dim=2)
            counts, sums = _sum_over_ranks(*statistics(tokens, best, num_clusters, mask))
            centroids = lloyd_centroids(counts, sums, centroids)
        self.centroids.copy_(centroids)
        self.ema_counts.copy_(counts)
        self.ema_sums.copy_(centroids * smoothed_counts(counts)[..., None])
        self._initialised = True

    @property
    def ready(self) -> bool:
        return self._initialised

    def diagnostics(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> dict[str, float]:
        """Share of the real queries and keys in at least one cluster, `query_coverage` and `key_coverage`."""
        covered = {"query_coverage": q, "key_coverage": k}
        return {name: float(coverage(x, self.centroids, self.window, key_mask).mean()) for name, x in covered.items()}

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._initialised)

    def set_extra_state(self, state: Tensor) -> None:
        self._initialised = bool(state)


@torch.compiler.assume_constant_result  # a question that torch.compile would break its graph to ask, for good
def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _check_options(num_heads: int, local_heads: int, commitment_weight: float, decay: float, init: str) -> None:
    if not isinstance(local_heads, int) or isinstance(local_heads, bool) or not 0 <= local_heads < num_heads:
        raise ValueError(
            f"attention.local_heads={local_heads!r} must leave a routing head: 0 to {num_heads - 1} of {num_heads}"
        )
    if not isinstance(commitment_weight, int | float) or not 0 <= commitment_weight < inf:
        raise ValueError(f"attention.commitment_weight={commitment_weight!r} must be a number, 0 or more")
    if not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise ValueError(f"attention.decay={decay!r} must be a number, at least 0 and below 1")
    if init not in INITS:
        raise ValueError(f"attention.init={init} is unknown; use one of {', '.join(INITS)}")


def _sum_over_ranks(counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return counts, sums
    packed = torch.cat([counts[..., None], sums], dim=-1)
    distributed.all_reduce(packed)
    return packed[..., 0], packed[..., 1:]


def _from_first_rank(x: Tensor) -> Tensor:
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(x, src=0)
    return x
