"""Device functions on tiles of tokens, shared by the kernels of several methods.

A program works for one head h of one sequence b, on the tokens of one of `splits` parts. Heads are the fastest index:
programs of neighbouring heads run together and share the cache lines of a (B, N, H, D) layout. Products that can pass
2³¹ are taken in 64 bits.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)
"""Logit of what must not count: far below every real one, yet finite, so that no −inf − (−inf) can become NaN."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(pid, num_heads, splits):
    """Sequence (64 bits), head and part of a program; parts are slower than heads."""
    return (pid // (num_heads * splits)).to(tl.int64), pid % num_heads, (pid // num_heads) % splits


@triton.jit
def real_rows(mask_ptr, mask_n, start, length, offset_n, HAS_MASK: tl.constexpr, FULL: tl.constexpr = False):
    """Which of the tokens start + offset_n are real; `mask_ptr` points at the sequence's mask.

    With FULL all are, as the compiler then knows.
    """
    if FULL:
        return tl.full(offset_n.shape, True, tl.int1)
    inside = start + offset_n < length
    if HAS_MASK:
        position = mask_ptr + tl.cast(start, tl.int64) * mask_n + offset_n * mask_n
        return tl.load(position, mask=inside, other=0) != 0
    else:
        return inside


@triton.jit
def load_rows(ptr, stride_n, start, offset_n, keep, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start + offset_n of a head (`ptr` points at its first), zero where not `keep` and in columns of padding."""
    offset_d = tl.arange(0, BLOCK_D)
    position = ptr + tl.cast(start, tl.int64) * stride_n + (offset_n[:, None] * stride_n + offset_d[None, :])
    if HEAD_DIM == BLOCK_D:
        return tl.load(position, mask=keep[:, None], other=0.0)
    else:
        return tl.load(position, mask=keep[:, None] & (offset_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride_n, start, offset_n, keep, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The converse of `load_rows`."""
    offset_d = tl.arange(0, BLOCK_D)
    position = ptr + tl.cast(start, tl.int64) * stride_n + (offset_n[:, None] * stride_n + offset_d[None, :])
    x = x.to(ptr.dtype.element_ty)
    if HEAD_DIM == BLOCK_D:
        tl.store(position, x, mask=keep[:, None])
    else:
        tl.store(position, x, mask=keep[:, None] & (offset_d < HEAD_DIM)[None, :])


@triton.jit
def gather_rows(ptr, stride_n, token, keep, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head at positions `token`, zero where not `keep` and in columns of padding."""
    offset_d = tl.arange(0, BLOCK_D)
    position = ptr + (token.to(tl.int64) * stride_n)[:, None] + offset_d[None, :]
    return tl.load(position, mask=keep[:, None] & (offset_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def scatter_rows(ptr, stride_n, token, keep, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The converse of `gather_rows`."""
    offset_d = tl.arange(0, BLOCK_D)
    position = ptr + (token.to(tl.int64) * stride_n)[:, None] + offset_d[None, :]
    tl.store(position, x.to(ptr.dtype.element_ty), mask=keep[:, None] & (offset_d < HEAD_DIM)[None, :])


@triton.jit
def window_weights(real, RATE: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr):
    """Weight of each token in the mean of its window of RATE tokens: 1 / (real tokens of the window), 0 if padded."""
    weight = tl.where(real, 1.0, 0.0).to(COMPUTE)
    if RATE > 1:
        windows = tl.reshape(weight, (BLOCK_N // RATE, RATE))
        count = tl.maximum(tl.sum(windows, axis=1), 1.0)
        weight = tl.reshape(windows / count[:, None], (BLOCK_N,))
    return weight


@triton.jit
def exponential(x, peak, PRECISION: tl.constexpr):
    """exp(x − peak), peak broadcast to x, of a tile.

    For 16-bit inputs in base 2 by one multiply-add, which cuts an argument of 10⁵ as fp32 itself does. `peak` must not
    be NEVER, whose rounding is larger than any logit.
    """
    if PRECISION == "ieee":
        return tl.exp(x - peak)
    else:
        return tl.exp2(x * LOG2E - peak * LOG2E)


@triton.jit
def widened(x, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """A tile (…, BLOCK_D) as it was read, in COMPUTE and laid out like the result of a product.

    By a product with the identity, which is exact for 16-bit inputs and costs less than to bring a tile from the layout
    of loads to that of products, where what follows meets it; left to itself the compiler would do that work twice.
    """
    if PRECISION == "ieee":
        return x.to(COMPUTE)
    else:
        offset_d = tl.arange(0, BLOCK_D)
        identity = tl.where(offset_d[:, None] == offset_d[None, :], 1.0, 0.0)
        return tl.dot(x, identity.to(x.dtype), out_dtype=COMPUTE)


@triton.jit
def product(a, b, COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b: operands in OPERAND, sums in COMPUTE."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), out_dtype=COMPUTE, input_precision=PRECISION)


@triton.jit
def halves(x):
    """The left and the right half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def ones_of(word):
    """Bits set in each 32-bit word."""
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)
