"""The router of AdaMRA-R on tiles of queries: which resolution each row reads, and how likely it was to."""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005  (Triton's tuples grow by +; it knows no unpacking)

import triton
import triton.language as tl

from kernels.common.tiles import NEVER, exponential, halves, product


@triton.jit
def load_vectors(ptr, step, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):
    """R vectors of WIDTH numbers, `step` apart."""
    offset_d = tl.arange(0, BLOCK_D)
    vectors = ()
    for r in tl.static_range(R):
        vector = tl.load(ptr + r * step + offset_d, mask=offset_d < WIDTH, other=0.0)
        vectors = vectors + (vector.to(COMPUTE),)
    return vectors


@triton.jit
def load_scalars(ptr, R: tl.constexpr, COMPUTE: tl.constexpr):
    scalars = ()
    for r in tl.static_range(R):
        scalars = scalars + (tl.load(ptr + r).to(COMPUTE),)
    return scalars


@triton.jit
def pick(choice, first, values, R: tl.constexpr):
    """values[choice] by row, where `first` is values[0] in the shape of the result."""
    picked = first
    for r in tl.static_range(1, R):
        picked = tl.where(choice == r, values[r], picked)
    return picked


@triton.jit
def route(q, router, R: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """The chosen resolution of every row, lowest index at a tie, and softmax(W q), one column a resolution."""
    logits = ()
    for r in tl.static_range(R):
        logits = logits + (tl.sum(q * router[r][None, :], axis=1),)
    highest, choice = logits[0], tl.zeros((BLOCK_N,), tl.int32)
    for r in tl.static_range(1, R):
        choice = tl.where(logits[r] > highest, r, choice)
        highest = tl.maximum(highest, logits[r])
    total, weights = tl.zeros((BLOCK_N,), COMPUTE), ()
    for r in tl.static_range(R):
        weights = weights + (exponential(logits[r], highest, PRECISION),)
        total += weights[r]
    inverse, shares = 1.0 / total, ()
    for r in tl.static_range(R):
        shares = shares + (weights[r] * inverse,)
    return choice, shares


@triton.jit
def load_router(
    ptr, R: tl.constexpr, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """W of one head as operands: (COLUMNS, D') for `split_columns`, and (D', 2 · COLUMNS) for `shares_of_rows`."""
    row, column, offset_d = tl.arange(0, COLUMNS)[:, None], tl.arange(0, 2 * COLUMNS)[None, :], tl.arange(0, BLOCK_D)
    inside = (row % BLOCK_R < R) & (offset_d < HEAD_DIM)[None, :]
    weights = tl.load(ptr + row % BLOCK_R * HEAD_DIM + offset_d[None, :], mask=inside, other=0.0).to(COMPUTE)
    rounded = weights.to(OPERAND)
    rest = (weights - rounded.to(COMPUTE)).to(OPERAND)
    back = tl.where(row // BLOCK_R < 2, rounded, tl.where(row // BLOCK_R == 2, rest, tl.zeros(weights.shape, OPERAND)))
    inside = (column % BLOCK_R < R) & (offset_d < HEAD_DIM)[:, None]
    weights = tl.load(ptr + column % BLOCK_R * HEAD_DIM + offset_d[:, None], mask=inside, other=0.0).to(COMPUTE)
    rounded = weights.to(OPERAND)
    rest = (weights - rounded.to(COMPUTE)).to(OPERAND)
    return back, tl.where(column < COLUMNS, rounded, rest)


@triton.jit
def shares_of_rows(
    q, router, R: tl.constexpr, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(W q) of every row, periodic in BLOCK_R columns, (rows, COLUMNS), and its maximum."""
    rounded, rest = halves(product(q, router, COMPUTE, OPERAND, PRECISION))
    logits = rounded + rest
    if R < BLOCK_R:
        logits = tl.where((tl.arange(0, COLUMNS) % BLOCK_R < R)[None, :], logits, NEVER)
    shares = exponential(logits, tl.max(logits, axis=1)[:, None], PRECISION)
    largest = (COLUMNS // BLOCK_R) / tl.sum(shares, axis=1)
    return shares * largest[:, None], largest
