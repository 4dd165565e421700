"""The classifier of the benchmark: embed → pre-LN blocks around an attention → pool → head."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import attention
from attention import Attention, SelfAttention
from kernels.embedding import embedding

PAD = 0
"""Token id of padding, in every task."""


class Block(nn.Module):
    """x + attention(LN(x)), then x + FFN(LN(x)), dropout on each branch."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float, core: Attention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, core)
        self.attention_dropout = nn.Dropout(dropout)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn_dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), key_mask))
        return x + self.ffn(self.ffn_norm(x))


class Encoder(nn.Module):
    """Tokens (B, N) of any integer dtype, N <= max_length, to pooled features (B, dim).

    patch   (height, width): tokens of a square grid are visited patch by patch, so that neighbours in the grid are
            neighbours in the sequence (MRA, §5.3 of arXiv 2207.10284 uses 4×8); None keeps raster order. It changes
            only the order that the attention sees: positions are embedded before it.
    """

    def __init__(
        self,
        core: Attention,
        *more: Attention,
        dim: int,
        ffn_dim: int,
        dropout: float,
        embedding_rows: int,
        max_length: int,
        pooling: str,
        patch: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.tokens = nn.Embedding(embedding_rows, dim)
        self.positions = nn.Embedding(max_length, dim)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, dropout, c) for c in (core, *more))
        self.norm = nn.LayerNorm(dim)
        self.max_length, self.pooling = max_length, pooling
        self.order: Tensor | None
        self.register_buffer("order", None if patch is None else patch_order(max_length, *patch), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = functional.pad(tokens, (0, self.max_length - tokens.shape[-1]), value=PAD)
        key_mask = tokens != PAD  # (B, N)
        x = self.dropout(embedding(tokens, self.tokens.weight) + self.positions.weight)
        if self.order is not None:
            x, key_mask = x[:, self.order], key_mask[:, self.order]
        for block in self.blocks:
            x = block(x, key_mask)
        return pool(self.norm(x), key_mask, self.pooling)

    def attentions(self) -> list[Attention]:
        return [m for m in self.modules() if isinstance(m, Attention)]


class Classifier(nn.Module):
    """An encoder and its head: Linear(features, ffn_dim) → ReLU → Linear(ffn_dim, num_classes).

    One tower: tokens (B, N). Two towers (Retrieval): tokens (B, 2, N) go through one encoder as a batch of 2B, and
    the head sees [a, b, a·b, a−b].
    """

    def __init__(self, encoder: Encoder, *, dim: int, ffn_dim: int, num_classes: int, two_towers: bool = False):
        super().__init__()
        self.encoder = encoder
        self.two_towers = two_towers
        self.head = nn.Sequential(
            nn.Linear(4 * dim if two_towers else dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, num_classes)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.two_towers:
            return self.head(self.encoder(tokens))
        a, b = self.encoder(tokens.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return self.head(torch.cat([a, b, a * b, a - b], dim=-1))

    def auxiliary_loss(self) -> Tensor:
        """Sum of the attentions' own losses in the last call."""
        return torch.stack([m.auxiliary_loss().to(self.device) for m in self.encoder.attentions()]).sum()

    def release(self) -> None:
        """Forget the last call's losses: `attention.base.Attention.release`."""
        for m in self.encoder.attentions():
            m.release()

    @property
    def device(self) -> torch.device:
        return self.encoder.tokens.weight.device

    def attention_impl(self, compiled: bool = False) -> str:
        """Which implementation of the attention runs on the model's device."""
        return self.encoder.attentions()[0].implementation(self.device, compiled)


def pool(x: Tensor, key_mask: Tensor, pooling: str) -> Tensor:
    """Mean of the real tokens' features, (B, N, dim) → (B, dim).

    pooling   "mean_full": the sum divided by the padded length N, as in the code of the Nyströmformer line
              "mean_real": divided by the number of real tokens (zero for a sequence without any)
    """
    total = (x * key_mask[..., None]).sum(1)
    if pooling == "mean_full":
        return total / x.shape[1]
    if pooling == "mean_real":
        return total / key_mask.sum(1, keepdim=True).clamp(min=1)
    raise ValueError(f"model.pooling={pooling} is unknown; use mean_full or mean_real")


def patch_order(length: int, height: int, width: int) -> Tensor:
    """Raster indices of a square grid of `length` cells in the order patch by patch, row-major within and between."""
    side = math.isqrt(length)
    if side * side != length or side % height or side % width:
        raise ValueError(f"model.patch=[{height}, {width}] does not tile a square grid of max_length={length} tokens")
    raster = torch.arange(length).view(side // height, height, side // width, width)
    return raster.transpose(1, 2).flatten()


def build_classifier(
    model: Mapping[str, Any], attention_name: str, options: Mapping[str, Any], *, num_classes: int, two_towers: bool
) -> Classifier:
    """The classifier of a cell from its `model` section (sizes), its attention and its task's shape."""
    cores = [
        attention.build(
            attention_name,
            num_heads=model["num_heads"],
            head_dim=model["head_dim"],
            max_length=model["max_length"],
            **options,
        )
        for _ in range(model["num_layers"])
    ]
    encoder = Encoder(
        *cores,
        dim=model["dim"],
        ffn_dim=model["ffn_dim"],
        dropout=model["dropout"],
        embedding_rows=model["embedding_rows"],
        max_length=model["max_length"],
        pooling=model["pooling"],
        patch=model["patch"],
    )
    return Classifier(
        encoder, dim=model["dim"], ffn_dim=model["ffn_dim"], num_classes=num_classes, two_towers=two_towers
    )
