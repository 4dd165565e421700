"""Windows of fused tokens inside one tile, in an order of its rows that makes them cheap.

Row p · (BLOCK_N / PHASES) + w of a tile is its token w · PHASES + p: tokens of a window of up to PHASES lie in one
thread's registers, so that fusing them moves nothing, and only coarser windows are summed across threads. At a rate
above PHASES windows are in their natural order. Rates are powers of two, so that windows nest: a coarse one is a sum
of finer ones.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from kernels.common.launch import Config
from kernels.common.tiles import real_rows


@triton.jit
def window_starts(RATE: tl.constexpr, BLOCK_N: tl.constexpr, PHASES: tl.constexpr):
    """Offset of the first token of every window of RATE tokens, in the order of the tile's windows."""
    window = tl.arange(0, BLOCK_N // RATE)
    if RATE >= PHASES:
        return window * RATE
    else:
        return window % (BLOCK_N // PHASES) * PHASES + window // (BLOCK_N // PHASES) * RATE


@triton.jit
def window_counts(
    mask_ptr, mask_n, start, length, RATE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr,
    PHASES: tl.constexpr,
):  # fmt: skip
    """Real tokens of every window, (BLOCK_N // RATE,)."""
    first = window_starts(RATE, BLOCK_N, PHASES)
    if HAS_MASK:
        if RATE == 1:
            return real_rows(mask_ptr, mask_n, start, length, first, HAS_MASK).to(tl.int32)
        else:
            offset = first[:, None] + tl.arange(0, RATE)[None, :]
            return tl.sum(real_rows(mask_ptr, mask_n, start, length, offset, HAS_MASK).to(tl.int32), axis=1)
    else:
        return tl.minimum(tl.maximum(length - start - first, 0), RATE)


@triton.jit
def windows_seen(
    mask_ptr, mask_n, start, length, RATE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr,
    PHASES: tl.constexpr,
):  # fmt: skip
    """Windows of RATE tokens with a real one among each PHASES tokens; at a higher rate, whether a window has one."""
    LONGER: tl.constexpr = max(RATE, PHASES)
    if HAS_MASK:
        first = tl.arange(0, BLOCK_N // LONGER) * LONGER
        offset = first[:, None, None] + tl.arange(0, LONGER // RATE)[None, :, None] * RATE
        offset += tl.arange(0, RATE)[None, None, :]
        real = real_rows(mask_ptr, mask_n, start, length, offset, HAS_MASK).to(tl.int32)
        return tl.sum(tl.max(real, axis=2), axis=1)
    else:
        tokens = window_counts(mask_ptr, mask_n, start, length, LONGER, HAS_MASK, BLOCK_N, PHASES)
        return (tokens + RATE - 1) // RATE


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
