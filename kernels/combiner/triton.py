"""Combiner-Fixed in Triton, forward: one launch summarises the spans, one attends to own tokens and summaries.

    k̂_r = max k_j,  q̂_r = max q_j,  h_r = Σ_j softmax_j(τ q̂_r·k_j) v_j   over the real tokens j of span r
    out_i = Σ_j P_ij v_j + Σ_r P_ir h_r,   P = softmax(τ q_i·[k of the own span | k̂ of the others])

forward   summaries 3 touches of one (B, H, N, D) tensor (q, k, v), attention 4 (q, k, v, out)
backward  `triton_backward`: gradients of the summaries 3 (q, out, do), of the shares 2 (k, v), everything else 7
          (q, k, v, do, dq, dk, dv)

in all 19, two above the floor: a pass of one warp a span over k and v costs less than the reductions across warps that
it takes out of the last pass. At D = 32, with s own tokens and G = N / s summaries, 16 D (s + G) FLOP and 2 (s + G)
exponentials a query stay below the time of those bytes until s + G is a few hundred. k̂ and h take 1 / s of a touch each
and come from cache. A launch walks the sequence from the end where the one before it stopped, so that it finds the last
tokens in cache. Logits are in units of log 2; visibility is a bias by column, which costs nothing beside the scaling.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import Config, arithmetic, block_dim, mask_arguments, state_dtype, strides
from kernels.common.tiles import LOG2E, NEVER, load_rows, place, product, real_rows, store_rows

MAX_BLOCK_G = 128
"""Summaries of a tile; a longer sequence takes several."""


# By rows of a tile: the span, padded. Rows are those of a tile of queries; one warp reduces a span without a barrier.
SUMMARISE = {16: Config(16, 1, 1), 32: Config(32, 1, 1), 64: Config(64, 1, 1), 128: Config(128, 1, 1)}
ATTEND = {16: Config(16, 1, 1), 32: Config(32, 2, 1), 64: Config(64, 4, 1), 128: Config(64, 4, 1)}


@triton.jit
def visible(bias, region, own, CAUSAL: tl.constexpr, INCLUDE_OWN: tl.constexpr):
    """Bias of the summaries `region` for the queries of span `own`."""
    if CAUSAL:
        return tl.where(region < own, bias, NEVER)
    elif INCLUDE_OWN:
        return bias
    else:
        return tl.where(region != own, bias, NEVER)


@triton.jit
def load_summaries(
    key_ptr, value_ptr, bias_ptr, first, spans, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """k̂, h and bias of the summaries first … first + BLOCK_G of a head; what does not exist has the bias NEVER."""
    region, offset_d = first + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = region < spans
    position = region[:, None] * BLOCK_D + offset_d[None, :]
    key = tl.load(key_ptr + position, mask=inside[:, None], other=0.0)
    value = tl.load(value_ptr + position, mask=inside[:, None], other=0.0)
    return key, value, tl.load(bias_ptr + region, mask=inside, other=NEVER).to(COMPUTE)


@triton.jit
def held_maximum(x, real, COMPUTE: tl.constexpr):
    """Maximum over the real rows of x, zero without any, and the rows that hold it, at least one; x is in COMPUTE."""
    highest = tl.max(tl.where(real[:, None], x, float("-inf")), axis=0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    holds = tl.where(real[:, None] & (x == highest[None, :]), 1.0, 0.0).to(COMPUTE)
    return highest, tl.maximum(tl.sum(holds, axis=0), 1.0)


@triton.jit
def pool(x, real, COMPUTE: tl.constexpr):
    """Maximum over the real rows of x, zero without any, and 1 / rows that hold it; x is in COMPUTE."""
    highest, holders = held_maximum(x, real, COMPUTE)
    return highest, 1.0 / holders


@triton.jit
def summarise_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    key_ptr, value_ptr, asking_ptr, bias_ptr,  # k̂, h, q̂ (B·H, G, D'), bias (B·H, G)
    share_ptr, ties_ptr,  # (B·H, N), (B·H, G, 2, D')
    length, num_heads, spans,
    SPAN: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Summary of one span of a head, and what its gradient needs: the shares a_j, and 1 / ties of q̂ and of k̂.

    The bias is zero, or NEVER where no token of the span is real.
    """
    b, h, span = place(tl.program_id(0), num_heads, spans)
    wide_h, head = h.to(tl.int64), b * num_heads + h
    start, offset_n, offset_d = span * SPAN, tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    keep = (start + offset_n < length) & (offset_n < SPAN)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK) & keep
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D).to(COMPUTE)
    asking, asking_ties = pool(q, real, COMPUTE)
    key, key_ties = pool(k, real, COMPUTE)
    logits = tl.where(real, tl.sum(k * asking[None, :], axis=1) * (HEAD_DIM**-0.5 * LOG2E), NEVER)
    share = tl.where(real, tl.exp2(logits - tl.max(logits, axis=0)), 0.0)
    mass = tl.sum(share, axis=0)
    share = share / tl.where(mass > 0, mass, 1.0)
    tl.store(share_ptr + head * length + start + offset_n, share, mask=keep)
    region = head * spans + span
    kind = key_ptr.dtype.element_ty
    tl.store(key_ptr + region * BLOCK_D + offset_d, key.to(kind))
    tl.store(value_ptr + region * BLOCK_D + offset_d, tl.sum(share[:, None] * v, axis=0).to(kind))
    tl.store(asking_ptr + region * BLOCK_D + offset_d, asking.to(kind))
    tl.store(ties_ptr + region * 2 * BLOCK_D + offset_d, asking_ties)
    tl.store(ties_ptr + (region * 2 + 1) * BLOCK_D + offset_d, key_ties)
    tl.store(bias_ptr + region, tl.where(mass > 0, 0.0, NEVER))


@triton.jit
def absorb(
    peak, mass, out, logits, value, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One more tile of logits and values in a running softmax."""
    higher = tl.maximum(peak, tl.max(logits, axis=1))
    weights, share = tl.exp2(logits - higher[:, None]), tl.exp2(peak - higher)
    out = product(weights, value, COMPUTE, OPERAND, PRECISION) + out * share[:, None]
    return higher, mass * share + tl.sum(weights, axis=1), out


@triton.jit
def attend_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    key_ptr, value_ptr, bias_ptr,  # (B·H, G, D'), (B·H, G, D'), (B·H, G)
    out_ptr, out_b, out_h, out_n,
    norm_ptr,  # (B·H, N): log₂ of the normaliser
    length, num_heads, spans,
    SPAN: tl.constexpr, CAUSAL: tl.constexpr, INCLUDE_OWN: tl.constexpr, HAS_MASK: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of one span of a head. ONE_BLOCK: all summaries are in one tile, which needs no running softmax."""
    b, h, span = place(tl.num_programs(0) - 1 - tl.program_id(0), num_heads, spans)
    wide_h = h.to(tl.int64)
    head = b * num_heads + h
    q_ptr += b * q_b + wide_h * q_h
    out_ptr += b * out_b + wide_h * out_h
    mask_ptr += b * mask_b
    norm_ptr += head * length
    key_ptr += head * spans * BLOCK_D
    value_ptr += head * spans * BLOCK_D
    bias_ptr += head * spans
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    offset_n, offset_m, region = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_G)
    start = span * SPAN
    if ONE_BLOCK:  # asked for first: no load waits behind a barrier
        key, value, bias = load_summaries(key_ptr, value_ptr, bias_ptr, 0, spans, BLOCK_G, BLOCK_D, COMPUTE)
        hidden = visible(bias, region, span, CAUSAL, INCLUDE_OWN)
    real = real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK) & (offset_n < SPAN)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    token_bias = tl.where(real, 0.0, NEVER)
    for row in range(0, SPAN, BLOCK_M):
        keep = (start + row + offset_m < length) & (row + offset_m < SPAN)
        asks = real_rows(mask_ptr, mask_n, start + row, length, offset_m, HAS_MASK) & keep
        q = load_rows(q_ptr, q_n, start + row, offset_m, asks, HEAD_DIM, BLOCK_D)
        own = product(q, tl.trans(k), COMPUTE, OPERAND, PRECISION) * SCALE + token_bias[None, :]
        if CAUSAL:
            own = tl.where(offset_n[None, :] <= row + offset_m[:, None], own, NEVER)
        peak = tl.max(own, axis=1)
        if ONE_BLOCK:
            others = product(q, tl.trans(key), COMPUTE, OPERAND, PRECISION) * SCALE + hidden[None, :]
            peak = tl.maximum(peak, tl.max(others, axis=1))
            weights, far = tl.exp2(own - peak[:, None]), tl.exp2(others - peak[:, None])
            mass = tl.sum(weights, axis=1) + tl.sum(far, axis=1)
            out = product(weights, v, COMPUTE, OPERAND, PRECISION)
            out += product(far, value, COMPUTE, OPERAND, PRECISION)
        else:
            weights = tl.exp2(own - peak[:, None])
            mass, out = tl.sum(weights, axis=1), product(weights, v, COMPUTE, OPERAND, PRECISION)
            for first in range(0, span if CAUSAL else spans, BLOCK_G):
                key, value, bias = load_summaries(key_ptr, value_ptr, bias_ptr, first, spans, BLOCK_G, BLOCK_D, COMPUTE)
                hidden = visible(bias, first + region, span, CAUSAL, INCLUDE_OWN)
                others = product(q, tl.trans(key), COMPUTE, OPERAND, PRECISION) * SCALE + hidden[None, :]
                peak, mass, out = absorb(peak, mass, out, others, value, COMPUTE, OPERAND, PRECISION)
        out = tl.where(asks[:, None], out / mass[:, None], 0.0)
        store_rows(out_ptr, out_n, start + row, offset_m, keep, out, HEAD_DIM, BLOCK_D)
        # A padded query has a normaliser so large that the backward pass gives it no weight.
        tl.store(norm_ptr + start + row + offset_m, tl.where(asks, peak + tl.log2(mass), -NEVER), mask=keep)


# ------------------------------------------------------------------------------------------------------------ launches


class Shape(NamedTuple):
    """What the launches of a call share."""

    batch: int
    heads: int
    length: int
    dim: int
    span: int

    @property
    def spans(self) -> int:
        return triton.cdiv(self.length, self.span)

    @property
    def rows(self) -> int:
        """Rows of a tile: a span, padded to what a matrix product on the hardware takes."""
        return max(16, triton.next_power_of_2(self.span))

    @property
    def summaries(self) -> int:
        """Summaries of a tile."""
        return min(MAX_BLOCK_G, max(16, triton.next_power_of_2(self.spans)))


def constants(q: Tensor, shape: Shape, masked: bool, causal: bool, include_own: bool) -> dict:
    """Compile-time constants of the kernels that see summaries."""
    return dict(
        SPAN=shape.span, CAUSAL=causal, INCLUDE_OWN=include_own, HAS_MASK=masked,
        BLOCK_G=shape.summaries,
        HEAD_DIM=shape.dim, BLOCK_S=shape.rows, BLOCK_D=block_dim(shape.dim), **arithmetic(q.dtype),
    )  # fmt: skip


def fit(config: Config, q: Tensor) -> Config:
    """The configuration for rows of `q`: those above are for at most 64 columns and products of half precision."""
    columns, bits = block_dim(q.shape[-1]), arithmetic(q.dtype)["OPERAND"].primitive_bitwidth
    warps = config.warps if columns <= 64 else max(config.warps, 8)
    return config._replace(warps=warps, stages=config.stages if columns * bits <= 2048 else 1)


def allocate(q: Tensor, span: int) -> list[Tensor]:
    """Output (B, H, N, D), laid out as (B, N, H, D), and what the backward pass reads of the call.

    norm (B·H, N), k̂, h and q̂ (B·H, G, D'), bias (B·H, G), shares (B·H, N), ties (B·H, G, 2, D')
    """
    batch, heads, length, dim = q.shape
    summaries, width, dtype = (batch * heads, -(-length // span)), block_dim(dim), state_dtype(q.dtype)
    return [
        q.new_empty(batch, length, heads, dim).transpose(1, 2),
        q.new_empty(batch * heads, length, dtype=dtype),
        *(q.new_empty(*summaries, width) for _ in range(3)),
        q.new_empty(summaries, dtype=dtype),
        q.new_empty(batch * heads, length, dtype=dtype),
        q.new_empty(*summaries, 2, width, dtype=dtype),
    ]


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, span: int, causal: bool, include_own: bool
) -> list[Tensor]:
    """What `allocate` names."""
    shape = Shape(*q.shape, span)
    batch, heads, length, dim, _ = shape
    spans, masked = shape.spans, key_mask is not None
    out, norm, key, value, asking, bias, share, ties = state = allocate(q, span)
    inputs = (q, *strides(q), k, *strides(k), v, *strides(v), *mask_arguments(key_mask, q))
    summarise_kernel[(batch * heads * spans,)](
        *inputs, key, value, asking, bias, share, ties, length, heads, spans,
        SPAN=span, HAS_MASK=masked, HEAD_DIM=dim, BLOCK_S=shape.rows, BLOCK_D=block_dim(dim),
        COMPUTE=arithmetic(q.dtype)["COMPUTE"], **fit(SUMMARISE[shape.rows], q).options,
    )  # fmt: skip
    config = fit(ATTEND[shape.rows], q)
    attend_kernel[(batch * heads * spans,)](
        *inputs, key, value, bias, out, *strides(out), norm, length, heads, spans,
        ONE_BLOCK=spans <= shape.summaries, BLOCK_M=config.rows, **constants(q, shape, masked, causal, include_own),
        **config.options,
    )  # fmt: skip
    return state
