"""Linear attention: a feature map in place of the exponential, and the sums over keys shared by all queries."""

from torch import Tensor
from torch.nn.functional import elu, pad

from attention.base import Attention
from attention.registry import register
from kernels.common.layout import compute_dtype, heads_last

EPSILON = 1e-6
"""Added to the normaliser, as published; it matters only where every feature of a query is almost zero."""

CHUNK = 64
"""Tokens whose pairs the causal form handles one by one; earlier tokens reach them as one sum."""


def kernel_attention(query_features: Tensor, key_features: Tensor, v: Tensor, epsilon: float, causal: bool) -> Tensor:
    """Attention with the similarity φ(q)·ψ(k), in time and memory linear in N.

    out_i = Σ_j (φ_i · ψ_j) v_j / (Σ_j φ_i · ψ_j + ε), over all j, or j <= i where causal

    query_features, key_features   φ and ψ >= 0, (B, H, N, F); ψ_j = 0 removes key j
    v                              (B, H, N, D), the result's shape too
    """
    values = pad(v, (0, 1), value=1.0)  # a last column of ones sums the normaliser along
    sums = causal_sums if causal else all_sums
    weighted = sums(query_features, key_features, values)
    return weighted[..., :-1] / (weighted[..., -1:] + epsilon)


def all_sums(query_features: Tensor, key_features: Tensor, values: Tensor) -> Tensor:
    """Σ_j (φ_i · ψ_j) values_j"""
    return query_features @ (key_features.transpose(-1, -2) @ values)


def causal_sums(query_features: Tensor, key_features: Tensor, values: Tensor) -> Tensor:
    """Σ_{j <= i} (φ_i · ψ_j) values_j, by chunks: pairs inside a chunk, a running sum for the chunks before it."""
    length = values.shape[2]
    query_features, key_features, values = (
        pad(x, (0, 0, 0, -length % CHUNK)).unflatten(2, (-1, CHUNK)) for x in (query_features, key_features, values)
    )  # (B, H, chunks, CHUNK, ·)
    ends = (key_features.transpose(-1, -2) @ values).cumsum(2)
    before = pad(ends[:, :, :-1], (0, 0, 0, 0, 1, 0))  # (B, H, chunks, F, D + 1)
    inside = (query_features @ key_features.transpose(-1, -2)).tril()
    return (query_features @ before + inside @ values).flatten(2, 3)[:, :, :length]


@register("linear")
class LinearAttention(Attention):
    """φ(q_i)·Σ_j φ(k_j) v_jᵀ / (φ(q_i)·Σ_j φ(k_j) + 1e-6) with φ(x) = elu(x) + 1.

    Katharopoulos et al. 2020 (arXiv 2006.16236), sections 3.2 and 3.3 (causal). No 1/√D there.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        query, key, value = (x.to(compute_dtype(q.dtype)) for x in (q, k, v))
        query_features, key_features = elu(query) + 1, elu(key) + 1
        if key_mask is not None:
            key_features = key_features.masked_fill(~key_mask[:, None, :, None], 0.0)
        out = kernel_attention(query_features, key_features, value, EPSILON, self.causal)
        return heads_last(out, key_mask, q.dtype)
