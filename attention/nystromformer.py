"""Nyströmformer: softmax attention through landmarks, the means of segments of the sequence."""

import torch
from torch import Tensor

from attention.base import Attention
from attention.registry import register
from kernels.common.inputs import check_positive
from kernels.common.layout import compute_dtype, heads_last
from kernels.common.masks import masked_softmax


def segment_means(x: Tensor, segments: Tensor) -> Tensor:
    """Mean of the rows of x (B, H, N, D) in each segment; segments (B, M, N) bool, empty ones give zero rows."""
    count = segments.sum(-1, keepdim=True).clamp(min=1)
    return (segments.to(x.dtype) / count)[:, None] @ x


def iterative_pinv(matrix: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse of row-stochastic matrices A (..., M, M), approximately, as the paper iterates it.

    Z ← ¼ Z (13 I - A Z (15 I - A Z (7 I - A Z))) from Z = Aᵀ / (‖A‖₁ ‖A‖∞), ‖A‖∞ = 1

    Rows and columns of A that are zero stay so in Z: a landmark that does not exist takes no part.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # M row sums of 1 are M column sums of mean 1, so the largest is at least 1, unless A is zero.
    largest = matrix.sum(-2, keepdim=True).amax(-1, keepdim=True).clamp(min=1.0)
    inverse = matrix.transpose(-1, -2) / largest
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    return inverse


@register("nystromformer")
class NystromformerAttention(Attention):
    """softmax(q k̃ᵀ) softmax(q̃ k̃ᵀ)⁺ softmax(q̃ kᵀ) v, logits over √D, with M landmarks q̃, k̃ (segment means).

    Xiong et al. 2021 (arXiv 2102.03902), without the optional convolution of the values. The r-th (from 0) of a
    sequence's n real tokens is in segment ⌊r M / n⌋: padding changes nothing, n < M tokens are n landmarks, and
    where M divides n = N these are the published segments of N / M tokens.

    num_landmarks     M
    pinv_iterations   steps of the iterative pseudo-inverse
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_length: int,
        causal: bool = False,
        impl: str = "auto",
        num_landmarks: int = 64,
        pinv_iterations: int = 6,
    ):
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        check_positive(num_landmarks=num_landmarks, pinv_iterations=pinv_iterations)
        if causal:
            raise ValueError("attention.causal=True is impossible for nystromformer: a landmark averages later tokens")
        self.num_landmarks, self.pinv_iterations = num_landmarks, pinv_iterations

    def segments(self, real: Tensor) -> Tensor:
        """Which real token is in which segment, (B, M, N) bool, from the key mask (B, N)."""
        rank = real.cumsum(-1) - 1
        segment = rank * self.num_landmarks // real.sum(-1, keepdim=True).clamp(min=1)
        landmarks = torch.arange(self.num_landmarks, device=real.device)
        return (segment[:, None] == landmarks[:, None]) & real[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        query, key, value = (x.to(compute_dtype(q.dtype)) for x in (q, k, v))
        real = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
        segments = self.segments(real)
        present = segments.any(-1)[:, None, None]  # (B, 1, 1, M): landmarks that exist

        query = query * self.head_dim**-0.5
        query_landmarks, key_landmarks = segment_means(query, segments), segment_means(key, segments)
        to_landmarks = masked_softmax(query @ key_landmarks.transpose(-1, -2), present)  # (B, H, N, M)
        between = masked_softmax(query_landmarks @ key_landmarks.transpose(-1, -2), present)  # (B, H, M, M)
        between = between.masked_fill(~present.transpose(-1, -2), 0.0)
        from_keys = masked_softmax(query_landmarks @ key.transpose(-1, -2), real[:, None, None])  # (B, H, M, N)
        out = to_landmarks @ iterative_pinv(between, self.pinv_iterations) @ (from_keys @ value)
        return heads_last(out, key_mask, q.dtype)
