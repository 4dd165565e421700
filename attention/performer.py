"""Performer: softmax attention estimated with positive orthogonal random features (FAVOR+)."""

import torch
from torch import Tensor

from attention.base import Attention
from attention.linear import kernel_attention
from attention.registry import register
from kernels.common.inputs import check_positive
from kernels.common.layout import compute_dtype, heads_last

EPSILON = 1e-30
"""Far below any normaliser that is not zero, where it turns 0 / 0 into 0."""


def orthogonal_gaussian(num_features: int, head_dim: int) -> Tensor:
    """Rows w_l ~ N(0, I), exactly orthogonal to each other within each group of head_dim rows; (F, D).

    Directions from a uniformly random rotation a group, lengths from independent Gaussian vectors (section 2.4).
    """
    groups = []
    for _ in range(-(-num_features // head_dim)):
        rotation, upper = torch.linalg.qr(torch.randn(head_dim, head_dim))
        groups.append(rotation * upper.diagonal().sign())  # the signs make QR's rotation a uniform one
    directions = torch.cat(groups)[:num_features]
    return directions * torch.randn(num_features, head_dim).norm(dim=1, keepdim=True)


@register("performer")
class PerformerAttention(Attention):
    """Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j) with φ(x)_l = exp(w_l·x' - ‖x'‖²/2) / √F, x' = x / D^¼.

    E[φ(q)·φ(k)] = exp(q·k / √D). Choromanski et al. 2021 (arXiv 2009.14794), lemma 1 and section 2.4. The directions
    w are drawn once, at construction, from torch's generator, and shared by the heads. The published code adds 1e-4
    to every feature against overflow and underflow; here the features are shifted exactly instead, see `features`.

    num_features   F, how many directions are drawn
    """

    projection: Tensor  # (F, D)

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_length: int,
        causal: bool = False,
        impl: str = "auto",
        num_features: int = 256,
    ):
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        check_positive(num_features=num_features)
        self.register_buffer("projection", orthogonal_gaussian(num_features, head_dim))

    def features(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of queries and keys, (B, H, N, F) each, up to a factor of each query, which the normaliser cancels.

        With logarithms a_il = w_l·q_i and b_jl = w_l·k_j - ‖k_j‖²/2, they are exp(b_jl - c_l) and
        exp(a_il + c_l - max_l). c_l = max_j b_jl makes every normaliser at least 1. The maximum over all j would
        let the future round the past, so the causal form takes the bound that no key can pass, c_l = ‖w_l‖²/2.
        """
        projection = self.projection.to(q.dtype)
        q, k = q * self.head_dim**-0.25, k * self.head_dim**-0.25
        query_logs = q @ projection.T
        key_logs = k @ projection.T - k.square().sum(-1, keepdim=True) / 2
        if key_mask is not None:
            key_logs = key_logs.masked_fill(~key_mask[:, None, :, None], -torch.inf)
        if self.causal:
            shift = projection.square().sum(-1) / 2
        else:
            shift = key_logs.detach().amax(2, keepdim=True).nan_to_num(neginf=0.0)  # -inf: no real token
        query_logs = query_logs + shift
        return (query_logs - query_logs.detach().amax(-1, keepdim=True)).exp(), (key_logs - shift).exp()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        query, key, value = (x.to(compute_dtype(q.dtype)) for x in (q, k, v))
        out = kernel_attention(*self.features(query, key, key_mask), value, EPSILON, self.causal)
        return heads_last(out, key_mask, q.dtype)
