"""Combiner-Axial, row-major and bidirectional, in Triton: a pass over rows and one over columns, each way.

With p = softmax_j(τ a[r, c]·k[r, j]) over the real tokens of a row, where a is the query, or the row's max-pooled query
at padding,

    k̂[r, c] = Σ_j p_j k[r, j],   h[r, c] = Σ_j p_j v[r, j],   λ[r, c] = ln Σ_j exp(τ a[r, c]·k[r, j])

A query's own row, token by token, is then one more summary: the value h[r, c] with the logit λ[r, c]. So the output is
plain attention down each column, over (k̂, h) of the other rows and λ, h on the diagonal.

k̂, h and their gradients are as large as k and v, and three such tensors beside out, dq, dk and dv are more than exact
attention takes. So h alone is kept for the backward pass, which makes k̂ anew, where dk will be; dk̂ replaces it, tile by
tile, and dk that, row by row; likewise dv replaces dh; and dq takes its share of the columns from where it goes itself.

Touches of one (B, H, N, D) tensor: rows 5 (q, k, v, k̂, h), columns 4 (q, k̂, h, out); backward rows 3 (q, k, k̂),
columns 6 (q, out, do, k̂, h, dq) + 6 (q, do, k̂, h, dk̂, dh), rows 9; in all 33, and at most 5 of them in memory: out, h,
dq, dk, dv. Making k̂ anew takes 4 % of a call's time on an H100 with rows of 64 tokens, and 8 % with rows of 128. A row
lies in one tile.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.combiner.triton import Shape, absorb, fit, pool
from kernels.common.launch import Config, arithmetic, block_dim, mask_arguments, state_dtype, strides
from kernels.common.tiles import LOG2E, NEVER, load_rows, place, product, real_rows, store_rows

# By rows of a tile: a row of the grid, padded; rows of a column that a tile takes.
ROWS = {16: Config(16, 1, 1), 32: Config(32, 2, 1), 64: Config(64, 4, 1), 128: Config(128, 8, 1)}
COLUMNS = {16: Config(16, 1, 1), 32: Config(32, 2, 1), 64: Config(64, 4, 1), 128: Config(64, 4, 1)}


@triton.jit
def ask(q, real, POOLED: tl.constexpr, COMPUTE: tl.constexpr):
    """The query of each summary of a row: the token's own, or, with POOLED, the row's maximum where it is padding."""
    if POOLED:
        highest, _ = pool(q.to(COMPUTE), real, COMPUTE)
        return tl.where(real[:, None], q, highest[None, :].to(q.dtype))
    else:
        return q


@triton.jit
def rows_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    key_ptr, key_b, key_h, key_n,
    value_ptr, value_b, value_h, value_n,
    mass_ptr, bias_ptr,  # λ (B·H, R, C), bias (B·H, R)
    length, num_heads, rows,
    VALUES: tl.constexpr, SPAN: tl.constexpr, POOLED: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every summary of one row, h only with VALUES; λ in units of log 2; the bias is NEVER for a row without tokens."""
    b, h, row = place(tl.program_id(0), num_heads, rows)
    wide_h = h.to(tl.int64)
    at = ((b * num_heads + h) * rows + row) * SPAN
    start, offset_n = row * SPAN, tl.arange(0, BLOCK_S)
    used = offset_n < SPAN
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK) & used
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    asking = ask(q, real, POOLED, COMPUTE)
    logits = product(asking, tl.trans(k), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E)
    logits += tl.where(real, 0.0, NEVER)[None, :]
    peak = tl.max(logits, axis=1)
    weights = tl.exp2(logits - peak[:, None])
    mass = tl.sum(weights, axis=1)
    key = product(weights, k, COMPUTE, OPERAND, PRECISION) / mass[:, None]
    store_rows(key_ptr + b * key_b + wide_h * key_h, key_n, start, offset_n, used, key, HEAD_DIM, BLOCK_D)
    if VALUES:
        v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
        value = product(weights, v, COMPUTE, OPERAND, PRECISION) / mass[:, None]
        store_rows(value_ptr + b * value_b + wide_h * value_h, value_n, start, offset_n, used, value, HEAD_DIM, BLOCK_D)
    tl.store(mass_ptr + at + offset_n, peak + tl.log2(mass), mask=used)
    some = tl.max(real.to(tl.int32), axis=0)
    tl.store(bias_ptr + (b * num_heads + h) * rows + row, tl.where(some > 0, 0.0, NEVER))


@triton.jit
def columns_kernel(
    q_ptr, q_b, q_h, q_n,
    mask_ptr, mask_b, mask_n,
    key_ptr, key_b, key_h, key_n,
    value_ptr, value_b, value_h, value_n,
    mass_ptr, bias_ptr,  # λ (B·H, R, C), bias (B·H, R)
    out_ptr, out_b, out_h, out_n,
    norm_ptr,  # (B·H, R, C): log₂ of the normaliser
    length, num_heads, rows,
    SPAN: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of a tile of queries in one column: a sequence whose tokens lie SPAN apart."""
    b, h, column = place(tl.program_id(0), num_heads, SPAN)
    wide_h, head = h.to(tl.int64), b * num_heads + h
    first, offset_n = tl.program_id(1) * BLOCK_N, tl.arange(0, BLOCK_N)
    count = (length - column + SPAN - 1) // SPAN  # tokens in this column
    keep = first + offset_n < count
    real = real_rows(mask_ptr + b * mask_b + column * mask_n, mask_n * SPAN, first, count, offset_n, HAS_MASK)
    q_ptr += b * q_b + wide_h * q_h + column * q_n
    q = load_rows(q_ptr, q_n * SPAN, first, offset_n, real, HEAD_DIM, BLOCK_D)
    at = head * rows * SPAN + column
    own = tl.load(mass_ptr + at + (first + offset_n) * SPAN, mask=keep, other=0.0)
    key_ptr += b * key_b + wide_h * key_h + column * key_n
    value_ptr += b * value_b + wide_h * value_h + column * value_n
    peak, mass = tl.full((BLOCK_N,), float("-inf"), COMPUTE), tl.zeros((BLOCK_N,), COMPUTE)
    out = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in range(0, rows, BLOCK_N):
        inside = start + offset_n < rows
        key = load_rows(key_ptr, key_n * SPAN, start, offset_n, inside, HEAD_DIM, BLOCK_D)
        value = load_rows(value_ptr, value_n * SPAN, start, offset_n, inside, HEAD_DIM, BLOCK_D)
        bias = tl.load(bias_ptr + head * rows + start + offset_n, mask=inside, other=NEVER)
        logits = product(q, tl.trans(key), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E) + bias[None, :]
        logits = tl.where(first + offset_n[:, None] == start + offset_n[None, :], own[:, None], logits)
        peak, mass, out = absorb(peak, mass, out, logits, value, COMPUTE, OPERAND, PRECISION)
    out = tl.where(real[:, None], out / mass[:, None], 0.0)
    out_ptr += b * out_b + wide_h * out_h + column * out_n
    store_rows(out_ptr, out_n * SPAN, first, offset_n, keep, out, HEAD_DIM, BLOCK_D)
    norm = tl.where(real, peak + tl.log2(mass), -NEVER)
    tl.store(norm_ptr + at + (first + offset_n) * SPAN, norm, mask=first + offset_n < rows)


@triton.jit
def columns_queries_kernel(
    q_ptr, q_b, q_h, q_n,
    out_ptr, out_b, out_h, out_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    key_ptr, key_b, key_h, key_n,
    value_ptr, value_b, value_h, value_n,
    mass_ptr, bias_ptr,  # λ (B·H, R, C), bias (B·H, R)
    norm_ptr, delta_ptr, grad_mass_ptr,  # (B·H, R, C)
    grad_q_ptr, gq_b, gq_h, gq_n,
    length, num_heads, rows,
    SPAN: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """δ, dλ, and dq from the other rows, of a tile of queries in one column."""
    b, h, column = place(tl.program_id(0), num_heads, SPAN)
    wide_h, head = h.to(tl.int64), b * num_heads + h
    first, offset_n = tl.program_id(1) * BLOCK_N, tl.arange(0, BLOCK_N)
    count = (length - column + SPAN - 1) // SPAN
    real = real_rows(mask_ptr + b * mask_b + column * mask_n, mask_n * SPAN, first, count, offset_n, HAS_MASK)
    q_ptr += b * q_b + wide_h * q_h + column * q_n
    out_ptr += b * out_b + wide_h * out_h + column * out_n
    grad_ptr += b * grad_b + wide_h * grad_h + column * grad_n
    q = load_rows(q_ptr, q_n * SPAN, first, offset_n, real, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr, out_n * SPAN, first, offset_n, real, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_ptr, grad_n * SPAN, first, offset_n, real, HEAD_DIM, BLOCK_D)
    delta = tl.sum(grad.to(COMPUTE) * out.to(COMPUTE), axis=1)
    at = head * rows * SPAN + column
    keep, mine = first + offset_n < rows, at + (first + offset_n) * SPAN
    norm = tl.load(norm_ptr + mine, mask=keep, other=-NEVER)
    own = tl.load(mass_ptr + mine, mask=keep, other=0.0)
    key_ptr += b * key_b + wide_h * key_h + column * key_n
    value_ptr += b * value_b + wide_h * value_h + column * value_n
    grad_mass, grad_q = tl.zeros((BLOCK_N,), COMPUTE), tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in range(0, rows, BLOCK_N):
        inside = start + offset_n < rows
        key = load_rows(key_ptr, key_n * SPAN, start, offset_n, inside, HEAD_DIM, BLOCK_D)
        value = load_rows(value_ptr, value_n * SPAN, start, offset_n, inside, HEAD_DIM, BLOCK_D)
        bias = tl.load(bias_ptr + head * rows + start + offset_n, mask=inside, other=NEVER)
        logits = product(q, tl.trans(key), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E) + bias[None, :]
        diagonal = first + offset_n[:, None] == start + offset_n[None, :]
        weights = tl.exp2(tl.where(diagonal, own[:, None], logits) - norm[:, None])
        reading = product(grad, tl.trans(value), COMPUTE, OPERAND, PRECISION)
        grad_logits = weights * (reading - delta[:, None])
        grad_mass += tl.sum(tl.where(diagonal, grad_logits, 0.0), axis=1)
        grad_q += product(tl.where(diagonal, 0.0, grad_logits), key, COMPUTE, OPERAND, PRECISION)
    tl.store(delta_ptr + mine, delta, mask=keep)
    tl.store(grad_mass_ptr + mine, grad_mass, mask=keep)
    grad_q_ptr += b * gq_b + wide_h * gq_h + column * gq_n
    keep, grad_q = first + offset_n < count, grad_q * HEAD_DIM**-0.5
    store_rows(grad_q_ptr, gq_n * SPAN, first, offset_n, keep, grad_q, HEAD_DIM, BLOCK_D)


@triton.jit
def columns_summaries_kernel(
    q_ptr, q_b, q_h, q_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    key_ptr, key_b, key_h, key_n,
    value_ptr, value_b, value_h, value_n,
    mass_ptr, bias_ptr,  # λ (B·H, R, C), bias (B·H, R)
    norm_ptr, delta_ptr, shift_ptr,  # (B·H, R, C)
    grad_value_ptr, gv_b, gv_h, gv_n,
    length, num_heads, rows,
    SPAN: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk̂, in the place of k̂, and dh of a tile of summaries in one column; summaries are rows here.

    dλ − dk̂·k̂ − dh·h takes the place of dλ. Both places are this program's own.
    """
    b, h, column = place(tl.program_id(0), num_heads, SPAN)
    wide_h, head = h.to(tl.int64), b * num_heads + h
    first, offset_n = tl.program_id(1) * BLOCK_N, tl.arange(0, BLOCK_N)
    count = (length - column + SPAN - 1) // SPAN
    q_ptr += b * q_b + wide_h * q_h + column * q_n
    grad_ptr += b * grad_b + wide_h * grad_h + column * grad_n
    mask_ptr += b * mask_b + column * mask_n
    key_ptr += b * key_b + wide_h * key_h + column * key_n
    value_ptr += b * value_b + wide_h * value_h + column * value_n
    at, keep = head * rows * SPAN + column, first + offset_n < rows
    key = load_rows(key_ptr, key_n * SPAN, first, offset_n, keep, HEAD_DIM, BLOCK_D)
    value = load_rows(value_ptr, value_n * SPAN, first, offset_n, keep, HEAD_DIM, BLOCK_D)
    bias = tl.load(bias_ptr + head * rows + first + offset_n, mask=keep, other=NEVER)
    shift_ptr += at + (first + offset_n) * SPAN
    shift = tl.load(shift_ptr, mask=keep, other=0.0)
    grad_key, grad_value = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE), tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in range(0, count, BLOCK_N):
        real = real_rows(mask_ptr, mask_n * SPAN, start, count, offset_n, HAS_MASK)
        q = load_rows(q_ptr, q_n * SPAN, start, offset_n, real, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_ptr, grad_n * SPAN, start, offset_n, real, HEAD_DIM, BLOCK_D)
        theirs, inside = at + (start + offset_n) * SPAN, start + offset_n < rows
        norm = tl.load(norm_ptr + theirs, mask=inside, other=-NEVER)
        delta = tl.load(delta_ptr + theirs, mask=inside, other=0.0)
        own = tl.load(mass_ptr + theirs, mask=inside, other=0.0)
        logits = product(key, tl.trans(q), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E) + bias[:, None]
        diagonal = first + offset_n[:, None] == start + offset_n[None, :]
        weights = tl.exp2(tl.where(diagonal, own[None, :], logits) - norm[None, :])
        grad_value += product(weights, grad, COMPUTE, OPERAND, PRECISION)
        reading = product(value, tl.trans(grad), COMPUTE, OPERAND, PRECISION)
        grad_logits = tl.where(diagonal, 0.0, weights * (reading - delta[None, :]))
        grad_key += product(grad_logits, q, COMPUTE, OPERAND, PRECISION)
    grad_key = (grad_key * HEAD_DIM**-0.5).to(key.dtype)
    grad_value = grad_value.to(value.dtype)
    shift -= tl.sum(grad_key.to(COMPUTE) * key.to(COMPUTE) + grad_value.to(COMPUTE) * value.to(COMPUTE), axis=1)
    tl.debug_barrier()  # all of the tile is read before any of it is written
    store_rows(key_ptr, key_n * SPAN, first, offset_n, keep, grad_key, HEAD_DIM, BLOCK_D)
    grad_value_ptr += b * gv_b + wide_h * gv_h + column * gv_n
    store_rows(grad_value_ptr, gv_n * SPAN, first, offset_n, keep, grad_value, HEAD_DIM, BLOCK_D)
    tl.store(shift_ptr, shift, mask=keep)


@triton.jit
def rows_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    mass_ptr, shift_ptr,  # (B·H, R, C)
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    length, num_heads, rows,
    SPAN: tl.constexpr, POOLED: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one row: dS_ij = p_ij (dh_i·v_j + dk̂_i·k_j − dh_i·h_i − dk̂_i·k̂_i + dλ_i); keys are rows here.

    They take the places of what the columns give: their share of dq, dk̂ and dh.
    """
    b, h, row = place(tl.program_id(0), num_heads, rows)
    wide_h = h.to(tl.int64)
    at = ((b * num_heads + h) * rows + row) * SPAN
    TAU: tl.constexpr = HEAD_DIM**-0.5
    start, offset_n = row * SPAN, tl.arange(0, BLOCK_S)
    used = offset_n < SPAN
    keep = used & (start + offset_n < length)
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK) & used
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    grad_q_ptr += b * gq_b + wide_h * gq_h
    grad_k_ptr += b * gk_b + wide_h * gk_h
    grad_v_ptr += b * gv_b + wide_h * gv_h
    grad_key = load_rows(grad_k_ptr, gk_n, start, offset_n, used, HEAD_DIM, BLOCK_D)
    grad_value = load_rows(grad_v_ptr, gv_n, start, offset_n, used, HEAD_DIM, BLOCK_D)
    mass = tl.load(mass_ptr + at + offset_n, mask=used, other=-NEVER)
    shift = tl.load(shift_ptr + at + offset_n, mask=used, other=0.0)
    asking = ask(q, real, POOLED, COMPUTE)
    logits = product(k, tl.trans(asking), COMPUTE, OPERAND, PRECISION) * (TAU * LOG2E)
    weights = tl.exp2(logits + tl.where(real, 0.0, NEVER)[:, None] - mass[None, :])
    grad_v = product(weights, grad_value, COMPUTE, OPERAND, PRECISION)
    reading = product(v, tl.trans(grad_value), COMPUTE, OPERAND, PRECISION)
    reading += product(k, tl.trans(grad_key), COMPUTE, OPERAND, PRECISION)
    grad_logits = weights * (reading + shift[None, :]) * TAU
    grad_k = product(weights, grad_key, COMPUTE, OPERAND, PRECISION)
    grad_k += product(grad_logits, asking, COMPUTE, OPERAND, PRECISION)
    grad_q = product(tl.trans(grad_logits), k, COMPUTE, OPERAND, PRECISION)
    if POOLED:
        # The pooled query asked at padding: its gradient goes to the rows that hold the maximum, in equal shares.
        from_padding = tl.sum(tl.where((used & (real == 0))[:, None], grad_q, 0.0), axis=0)
        highest, ties = pool(q.to(COMPUTE), real, COMPUTE)
        holds = q.to(COMPUTE) == highest[None, :]
        grad_q = tl.where(real[:, None], grad_q + tl.where(holds, (from_padding * ties)[None, :], 0.0), 0.0)
    grad_q += load_rows(grad_q_ptr, gq_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    tl.debug_barrier()  # all of the row is read before any of it is written
    store_rows(grad_q_ptr, gq_n, start, offset_n, keep, grad_q, HEAD_DIM, BLOCK_D)
    store_rows(grad_k_ptr, gk_n, start, offset_n, keep, grad_k, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr, gv_n, start, offset_n, keep, grad_v, HEAD_DIM, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ launches


def _grid_like(x: Tensor, span: int) -> Tensor:
    """Empty (B, H, R C, D), laid out like x (B, H, N, D): room for the summaries of a ragged last row as well."""
    batch, heads, length, dim = x.shape
    tokens = triton.cdiv(length, span) * span
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    return x.new_empty(batch, heads, tokens, dim)


def _by_summary(q: Tensor, span: int) -> Tensor:
    """Empty (B·H, R, C): one number for each summary."""
    batch, heads, length, _ = q.shape
    return q.new_empty(batch * heads, triton.cdiv(length, span), span, dtype=state_dtype(q.dtype))


def allocate(q: Tensor, span: int) -> list[Tensor]:
    """Output (B, H, N, D), laid out as (B, N, H, D), and what the backward pass reads: norm and h."""
    batch, heads, length, dim = q.shape
    out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    return [out, _by_summary(q, span), _grid_like(out, span)]


def allocate_gradients(q: Tensor, k: Tensor, v: Tensor, span: int) -> list[Tensor]:
    """dq, dk and dv; the last two are the first tokens of what has room for summaries."""
    return [torch.empty_like(q), *(_grid_like(x, span)[:, :, : x.shape[2]] for x in (k, v))]


def _constants(q: Tensor, shape: Shape, masked: bool) -> tuple[dict, dict, dict, Config]:
    """Compile-time constants of every launch, those of rows and of columns besides, and the tile of a column."""
    column = fit(COLUMNS[min(128, max(16, triton.next_power_of_2(shape.spans)))], q)
    flags = dict(SPAN=shape.span, HAS_MASK=masked, HEAD_DIM=shape.dim, BLOCK_D=block_dim(shape.dim))
    pooled = masked or shape.length % shape.span != 0
    rows = dict(POOLED=pooled, BLOCK_S=shape.rows, **fit(ROWS[shape.rows], q).options)
    return {**flags, **arithmetic(q.dtype)}, rows, dict(BLOCK_N=column.rows, **column.options), column


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, span: int, causal: bool, include_own: bool
) -> list[Tensor]:
    """What `allocate` names. There is no causal form, and none with the own row's summaries."""
    shape = Shape(*q.shape, span)
    flags, rows, columns, column = _constants(q, shape, key_mask is not None)
    out, norm, value = state = allocate(q, span)
    key, mass, bias = torch.empty_like(value), torch.empty_like(norm), torch.empty_like(norm[..., 0])
    mask, sequences = mask_arguments(key_mask, q), shape.batch * shape.heads
    sizes = (shape.length, shape.heads, shape.spans)
    summaries = (key, *strides(key), value, *strides(value), mass, bias)
    rows_kernel[(sequences * shape.spans,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask, *summaries, *sizes, VALUES=True, **flags, **rows
    )
    columns_kernel[(sequences * span, triton.cdiv(shape.spans, column.rows))](
        q, *strides(q), *mask, *summaries, out, *strides(out), norm, *sizes, **flags, **columns
    )
    return state


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: list[Tensor],
    span: int, causal: bool, include_own: bool,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv in the layout of q, k, v."""
    shape = Shape(*q.shape, span)
    flags, rows, columns, column = _constants(q, shape, key_mask is not None)
    out, norm, value = state
    mask, sequences = mask_arguments(key_mask, q), shape.batch * shape.heads
    sizes = (shape.length, shape.heads, shape.spans)
    grid = (sequences * span, triton.cdiv(shape.spans, column.rows))
    mass, delta, shift = (torch.empty_like(norm) for _ in range(3))
    grads = allocate_gradients(q, k, v, span)
    grad_q, grad_k, grad_v = grads  # k̂ and dk̂ stand in the place of dk, dh in that of dv
    summaries = (grad_k, *strides(grad_k), value, *strides(value), mass, torch.empty_like(norm[..., 0]))
    rows_kernel[(sequences * shape.spans,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask, *summaries, *sizes, VALUES=False, **flags, **rows
    )
    columns_queries_kernel[grid](
        q, *strides(q), out, *strides(out), grad, *strides(grad), *mask, *summaries,
        norm, delta, shift, grad_q, *strides(grad_q), *sizes, **flags, **columns,
    )  # fmt: skip
    columns_summaries_kernel[grid](
        q, *strides(q), grad, *strides(grad), *mask, *summaries,
        norm, delta, shift, grad_v, *strides(grad_v), *sizes, **flags, **columns,
    )  # fmt: skip
    rows_backward_kernel[(sequences * shape.spans,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask, mass, shift,
        grad_q, *strides(grad_q), grad_k, *strides(grad_k), grad_v, *strides(grad_v), *sizes, **flags, **rows,
    )  # fmt: skip
    return grads
