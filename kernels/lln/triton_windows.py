"""Windows of fused tokens inside one tile, in an order of its rows that makes them cheap.

Row p · (BLOCK_N / PHASES) + w of a tile is its token w · PHASES + p: tokens of a window of up to PHASES lie in one
thread's registers, so that fusing them moves nothing, and only coarser windows are summed across threads. At a rate
above PHASES windows are in their natural order. Rates are powers of two, so that windows nest: a coarse one is a sum
of finer ones.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.launch import Config, arithmetic, mask_arguments, state_dtype
from kernels.common.tiles import real_rows

MASK_TILE = 1024
"""Tokens of which one program counts the real ones."""


@triton.jit
def window_starts(RATE: tl.constexpr, BLOCK_N: tl.constexpr, PHASES: tl.constexpr):
    """Offset of the first token of every window of RATE tokens, in the order of the tile's windows."""
    window = tl.arange(0, BLOCK_N // RATE)
    if RATE >= PHASES:
        return window * RATE
    else:
        return window % (BLOCK_N // PHASES) * PHASES + window // (BLOCK_N // PHASES) * RATE


@triton.jit
def window_shares(
    mask_ptr, mask_n, share_ptr, start, length, RATE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr,
    PHASES: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr = False,
):  # fmt: skip
    """1 / (real tokens) of every window, 0 of one without any, (BLOCK_N // RATE,); `share_ptr` is that of RATE.

    With FULL every token is real.
    """
    if FULL:
        return tl.full((BLOCK_N // RATE,), 1.0 / RATE, COMPUTE)
    first = window_starts(RATE, BLOCK_N, PHASES)
    if HAS_MASK:
        if RATE == 1:
            return tl.where(real_rows(mask_ptr, mask_n, start, length, first, HAS_MASK), 1.0, 0.0).to(COMPUTE)
        else:
            inside = start + first < length
            return tl.load(share_ptr + start // RATE + first // RATE, mask=inside, other=0.0).to(COMPUTE)
    else:
        count = tl.minimum(length - start - first, RATE)
        return tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(COMPUTE), 0.0)


@triton.jit
def window_shares_kernel(
    mask_ptr, mask_b, mask_n, share_ptr, share_r, share_b, length,  # (B, N), (R, B, windows)
    LEVELS: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What `window_shares` reads of BLOCK_N tokens of one sequence, at every rate."""
    b, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    mask_ptr += b * mask_b
    share_ptr += b * share_b
    real = real_rows(mask_ptr, mask_n, start, length, tl.arange(0, BLOCK_N), True).to(tl.int32)
    for r in tl.static_range(R):
        if LEVELS[r + 1] > 1:
            count = tl.sum(tl.reshape(real, (BLOCK_N // LEVELS[r + 1], LEVELS[r + 1])), axis=1)
            share = tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(COMPUTE), 0.0)
            first = start + tl.arange(0, BLOCK_N // LEVELS[r + 1]) * LEVELS[r + 1]
            tl.store(share_ptr + r * share_r + first // LEVELS[r + 1], share, mask=first < length)


@triton.jit
def window_sums(
    x, FROM: tl.constexpr, TO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PHASES: tl.constexpr,
    HIGHEST: tl.constexpr = False,
):  # fmt: skip
    """Rows of x, windows of FROM tokens, summed to windows of TO tokens; with HIGHEST their largest instead."""
    MIDDLE: tl.constexpr = min(max(FROM, PHASES), TO)  # up to here windows are apart by whole groups of rows
    if FROM < MIDDLE:
        x = tl.reshape(x, (PHASES // MIDDLE, MIDDLE // FROM, BLOCK_N // PHASES, BLOCK_D))
        x = tl.max(x, axis=1) if HIGHEST else tl.sum(x, axis=1)
        x = tl.reshape(x, (BLOCK_N // MIDDLE, BLOCK_D))
    if MIDDLE < TO:
        x = tl.reshape(x, (BLOCK_N // TO, TO // MIDDLE, BLOCK_D))
        x = tl.max(x, axis=1) if HIGHEST else tl.sum(x, axis=1)
    return x


@triton.jit
def window_spread(
    x, FROM: tl.constexpr, TO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PHASES: tl.constexpr
):
    """Rows of x, windows of FROM tokens, given to each of the windows of TO tokens inside."""
    MIDDLE: tl.constexpr = min(max(TO, PHASES), FROM)
    if MIDDLE < FROM:
        x = tl.broadcast_to(x[:, None, :], (BLOCK_N // FROM, FROM // MIDDLE, BLOCK_D))
        x = tl.reshape(x, (BLOCK_N // MIDDLE, BLOCK_D))
    if TO < MIDDLE:
        x = tl.reshape(x, (PHASES // MIDDLE, BLOCK_N // PHASES, BLOCK_D))[:, None, :, :]
        x = tl.broadcast_to(x, (PHASES // MIDDLE, MIDDLE // TO, BLOCK_N // PHASES, BLOCK_D))
        x = tl.reshape(x, (BLOCK_N // TO, BLOCK_D))
    return x


def windows(rates: tuple[int, ...], config: Config) -> dict:
    """Compile-time constants of tiles of fused tokens: LEVELS, ORDER, R and PHASES of the kernels."""
    order = tuple(sorted(range(len(rates)), key=rates.__getitem__))
    phases = max(1, min(max(rates), config.rows // (16 * config.warps)))  # rows that a thread holds in any layout
    return dict(LEVELS=(1, *(rates[i] for i in order)), ORDER=order, R=len(rates), PHASES=phases)


def full(key_mask: Tensor | None, length: int, config: Config) -> bool:
    """Every token of every tile is real."""
    return key_mask is None and length % config.rows == 0


def rows_loaded(config: Config, width: int, dtype: torch.dtype) -> int:
    """Rows of a tile of `width` columns that one thread loads: the PHASES of a pass that keeps that layout."""
    return max(1, config.rows * width * dtype.itemsize // (16 * 32 * config.warps))  # 16 bytes of each


def shares_of_windows(key_mask: Tensor | None, rates: tuple[int, ...], placeholder: Tensor) -> tuple[Tensor, int, int]:
    """Pointer and strides (of rate, of sequence) of 1 / (real tokens) of all windows, rates in rising order.

    It is read with a mask and at rates above 1 only; else any pointer.
    """
    levels = tuple(sorted(rates))
    if key_mask is None or levels[-1] == 1:
        return placeholder, 0, 0
    batch, length = key_mask.shape
    shares = torch.empty(len(levels), batch, length, dtype=state_dtype(placeholder.dtype), device=key_mask.device)
    window_shares_kernel[(batch, triton.cdiv(length, MASK_TILE))](
        *mask_arguments(key_mask, placeholder), shares, shares.stride(0), shares.stride(1), length,
        LEVELS=(1, *levels), R=len(levels), BLOCK_N=MASK_TILE, COMPUTE=arithmetic(placeholder.dtype)["COMPUTE"],
        num_warps=4,
    )  # fmt: skip
    return shares, shares.stride(0), shares.stride(1)
