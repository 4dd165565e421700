"""The drop-in layer: an attention with its projections around it."""

from typing import Any

from torch import Tensor, nn

from attention.base import Attention
from attention.registry import build


class SelfAttention(nn.Module):
    """Self-attention over x: fused q, k, v projection → an attention of this project → output projection.

    out = layer(x, key_mask=None)

    x          (B, N, dim), any float dtype that the weights have, or under autocast
    key_mask   (B, N) bool, True = real token (`nn.MultiheadAttention`'s key_padding_mask is its opposite); None = all
    out        (B, N, dim). Padding never changes a real token; at padded tokens stands the bias of the output
               projection

    q, k and v are views of one product: heads are never transposed in memory, neither here nor in the kernels.

    State. Beside the weights `qkv` and `out`, the layer carries what its attention, `core`, does, all of it in
    `state_dict()`:

    adamra        a router, trained; σ of queries and keys, used with statistics="running" and "frozen"
    lln           σ of queries and keys, likewise; r and p of diag="learnable_…", trained
    routing       centroids, and the running counts and sums that they follow, no parameters: every call in training
                  mode moves them, no call in evaluation does. With init="lloyd" the first training call sets them up
                  and must come before a CUDA graph is captured. Under data parallelism all ranks hold the same
    linformer     projections of the length, trained, for N up to max_length
    performer     random features, drawn once
    others        none

    With the default statistics="batch" of lln and adamra, scales are those of the call, over its real tokens: an
    output depends on batch mates, slightly, in training and evaluation. "running" keeps averages in training and uses
    them in evaluation; "frozen" uses those of the first training call.

    Activation checkpointing needs use_reentrant=False, since the other form loses the gradient of the auxiliary loss.
    It runs a call twice, so what training calls move is moved twice a step.
    """

    def __init__(self, dim: int, core: Attention, bias: bool = True):
        super().__init__()
        inner = core.num_heads * core.head_dim
        self.core = core
        self.qkv = nn.Linear(dim, 3 * inner, bias=bias)
        self.out = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(f"x must be (B, N, dim) with dim={self.qkv.in_features}, got {tuple(x.shape)}")
        qkv = self.qkv(x).unflatten(-1, (3, self.core.num_heads, self.core.head_dim))  # (B, N, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D), a view
        return self.out(self.core(q, k, v, key_mask).transpose(1, 2).flatten(2))

    def auxiliary_loss(self) -> Tensor:
        """What the attention adds to the loss of the last call, already weighted; zero where it has none."""
        return self.core.auxiliary_loss()


def layer(
    name: str,
    dim: int,
    num_heads: int,
    *,
    max_length: int,
    head_dim: int | None = None,
    causal: bool = False,
    impl: str = "auto",
    bias: bool = True,
    **method_options: Any,
) -> SelfAttention:
    """A self-attention layer with the attention `name` inside, see `SelfAttention`; needs only torch and Triton.

    dim            features of a token
    num_heads      H; each head has head_dim features, by default dim / num_heads
    max_length     longest N it will see
    causal         token i sees tokens j <= i; ValueError where the method has no causal form
    impl           "auto" | "reference" | "triton", see `attention.build`
    bias           of both projections
    method_options the method's own, see `attention.options(name)`

    ValueError, in one line, for a size or an option that is not possible.
    """
    if not _positive(dim):
        raise ValueError(f"dim={dim!r} must be a positive integer")
    if head_dim is None:
        if not _positive(num_heads) or dim % num_heads:
            raise ValueError(f"attention.num_heads={num_heads!r} does not divide dim={dim!r}; give head_dim")
        head_dim = dim // num_heads
    sizes = dict(num_heads=num_heads, head_dim=head_dim, max_length=max_length)
    core = build(name, **sizes, causal=causal, impl=impl, **method_options)
    return SelfAttention(dim, core, bias)


def _positive(size: int) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0
