"""The classifier of the benchmark: embed → pre-LN blocks around an attention → pool → head."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import attention
from attention import Attention, SelfAttention
from kernels.embedding import embedding

PAD = 0
"""Token id of padding, in every task."""

POOLINGS = ("mean_full", "mean_real", "mean_all", "cls", "first")
POSITIONS = ("learned", "sinusoidal")
PAIR_HEADS = ("interaction", "concat")


class Block(nn.Module):
    """x + attention(LN(x)), then x + FFN(LN(x)), dropout on each branch."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float, core: Attention, bias: bool):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, core, bias)
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

    pooling          see `pool`; with "cls" a learned token, zero at first, stands before the sequence
    positions        "learned" | "sinusoidal", see `sinusoids`
    token_std        standard deviation of the token table at the start
    attention_bias   whether the projections around the attention have one
    patch            (height, width): tokens of a square grid are visited patch by patch, so that neighbours in the
                     grid are neighbours in the sequence (MRA, §5.3 of arXiv 2207.10284 uses 4×8); None keeps raster
                     order. It changes only the order that the attention sees: positions are embedded before it.
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
        positions: str = "learned",
        token_std: float = 0.02,
        attention_bias: bool = True,
    ):
        super().__init__()
        self.tokens = nn.Embedding(embedding_rows, dim)
        self.positions = nn.Embedding(sequence_length(max_length, pooling), dim)
        nn.init.normal_(self.tokens.weight, std=token_std)
        nn.init.normal_(self.positions.weight, std=0.02)
        if positions == "sinusoidal":
            self.positions = nn.Embedding.from_pretrained(sinusoids(*self.positions.weight.shape))
        self.cls = nn.Parameter(torch.zeros(dim)) if pooling == "cls" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, dropout, c, attention_bias) for c in (core, *more))
        self.norm = nn.LayerNorm(dim)
        self.max_length, self.pooling = max_length, pooling
        order = None if patch is None else patch_order(max_length, *patch)
        if order is not None and self.cls is not None:
            order = functional.pad(order + 1, (1, 0))  # the learned token stays in front
        self.order: Tensor | None
        self.register_buffer("order", order, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = functional.pad(tokens, (0, self.max_length - tokens.shape[-1]), value=PAD)
        key_mask = tokens != PAD  # (B, N)
        x = embedding(tokens, self.tokens.weight)
        if self.cls is not None:
            x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
            key_mask = functional.pad(key_mask, (1, 0), value=True)
        x = self.dropout(x + self.positions.weight)
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
    the head sees the pair of features:

    pair_head   "interaction": [a, b, a·b, a−b]
                "concat": [a, b], with a layer Linear(ffn_dim, ffn_dim / 2) → ReLU more
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        dim: int,
        ffn_dim: int,
        num_classes: int,
        two_towers: bool = False,
        pair_head: str = "interaction",
    ):
        super().__init__()
        self.encoder = encoder
        self.two_towers, self.pair_head = two_towers, pair_head
        features = dim * (1 if not two_towers else 2 if pair_head == "concat" else 4)
        widths = [features, ffn_dim, ffn_dim // 2] if two_towers and pair_head == "concat" else [features, ffn_dim]
        hidden = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
        self.head = nn.Sequential(*hidden, nn.Linear(widths[-1], num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.two_towers:
            return self.head(self.encoder(tokens))
        a, b = self.encoder(tokens.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        pair = [a, b] if self.pair_head == "concat" else [a, b, a * b, a - b]
        return self.head(torch.cat(pair, dim=-1))

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
    """What stands for a sequence, (B, N, dim) → (B, dim).

    pooling   "mean_full": the sum over real tokens divided by the padded length N, as in the Nyströmformer line's code
              "mean_real": divided by the number of real tokens (zero for a sequence without any)
              "mean_all": the mean of all N, padding included, as in the original code
              "cls", "first": the first token; it is the learned one, or that of the text
    """
    if pooling == "mean_all":
        return x.mean(1)
    if pooling in ("cls", "first"):
        return x[:, 0]
    total = (x * key_mask[..., None]).sum(1)
    if pooling == "mean_full":
        return total / x.shape[1]
    if pooling == "mean_real":
        return total / key_mask.sum(1, keepdim=True).clamp(min=1)
    raise ValueError(f"model.pooling={pooling} is unknown; use one of {', '.join(POOLINGS)}")


def sequence_length(max_length: int, pooling: str) -> int:
    """Tokens that an attention sees of a sequence padded to `max_length`."""
    return max_length + (pooling == "cls")


def sinusoids(length: int, dim: int) -> Tensor:
    """Position p: sin(p / 10000^(2i/dim)) at feature 2i, its cosine at 2i + 1 (arXiv 1706.03762, §3.5); `dim` even."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


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
    """The classifier of a cell from its `model` section, its attention and its task's shape.

    What `model` does not have is as `Encoder` and `Classifier` have it: records of earlier versions are shorter.
    """
    cores = [
        attention.build(
            attention_name,
            num_heads=model["num_heads"],
            head_dim=model["head_dim"],
            max_length=sequence_length(model["max_length"], model["pooling"]),
            **options,
        )
        for _ in range(model["num_layers"])
    ]
    head = {key: model[key] for key in ("pair_head",) if key in model}
    encoder = Encoder(*cores, **{key: value for key, value in model.items() if key not in NOT_ENCODER})
    return Classifier(
        encoder, dim=model["dim"], ffn_dim=model["ffn_dim"], num_classes=num_classes, two_towers=two_towers, **head
    )


NOT_ENCODER = ("num_layers", "num_heads", "head_dim", "pair_head")
"""Keys of a `model` section that its attentions or its head take; the others are the encoder's."""
