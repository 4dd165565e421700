"""Combiner-Axial, row-major and bidirectional, in Triton: a pass over rows and one over columns, each way.

With p = softmax_j(τ a[r, c]·k[r, j]) over the real tokens of a row, where a is the query, or the row's max-pooled query
at padding,

    k̂[r, c] = Σ_j p_j k[r, j],   h[r, c] = Σ_j p_j v[r, j],   λ[r, c] = ln Σ_j exp(τ a[r, c]·k[r, j])

A query's own row, token by token, is then one more summary: the value h[r, c] with the logit λ[r, c]. So the output is
plain attention down each column, over (k̂, h) of the other rows and λ, h on the diagonal.

Touches of one (B, H, N, D) tensor: rows 5 (q, k, v, k̂, h), columns 4 (q, k̂, h, out); backward columns 7 + 7, of which
dq leaves in float32, rows 10. k̂, h and their gradients are as large as k and v: this pattern needs more memory than
exact attention. A row lies in one tile.
"""

# Constants reach a kernel as values, and launches take options of Triton's own: types that pyright misreads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.combiner.triton import LOG2E, Shape, absorb, fit, pool
from kernels.common.launch import Config, arithmetic, block_dim, mask_arguments, state_dtype, strides
from kernels.common.tiles import NEVER, load_rows, place, product, real_rows, store_rows

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
    key_ptr, value_ptr, mass_ptr, bias_ptr,  # k̂, h (B·H, R, C, D'), λ (B·H, R, C), bias (B·H, R)
    length, num_heads, rows,
    SPAN: tl.constexpr, POOLED: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every summary of one row; λ in units of log 2; the bias is NEVER where no token of the row is real."""
    b, h, row = place(tl.program_id(0), num_heads, rows)
    wide_h = h.to(tl.int64)
    at = ((b * num_heads + h) * rows + row) * SPAN
    start, offset_n = row * SPAN, tl.arange(0, BLOCK_S)
    used = offset_n < SPAN
    real = real_rows(mask_ptr + b * mask_b, mask_n, start, length, offset_n, HAS_MASK) & used
    q = load_rows(q_ptr + b * q_b + wide_h * q_h, q_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    k = load_rows(k_ptr + b * k_b + wide_h * k_h, k_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * v_b + wide_h * v_h, v_n, start, offset_n, real, HEAD_DIM, BLOCK_D)
    asking = ask(q, real, POOLED, COMPUTE)
    logits = product(asking, tl.trans(k), COMPUTE, OPERAND, PRECISION) * (HEAD_DIM**-0.5 * LOG2E)
    logits += tl.where(real, 0.0, NEVER)[None, :]
    peak = tl.max(logits, axis=1)
    weights = tl.exp2(logits - peak[:, None])
    mass = tl.sum(weights, axis=1)
    key = product(weights, k, COMPUTE, OPERAND, PRECISION) / mass[:, None]
    value = product(weights, v, COMPUTE, OPERAND, PRECISION) / mass[:, None]
    store_rows(key_ptr + at * BLOCK_D, BLOCK_D, 0, offset_n, used, key, BLOCK_D, BLOCK_D)
    store_rows(value_ptr + at * BLOCK_D, BLOCK_D, 0, offset_n, used, value, BLOCK_D, BLOCK_D)
    tl.store(mass_ptr + at + offset_n, peak + tl.log2(mass), mask=used)
    some = tl.max(real.to(tl.int32), axis=0)
    tl.store(bias_ptr + (b * num_heads + h) * rows + row, tl.where(some > 0, 0.0, NEVER))


@triton.jit
def columns_kernel(
    q_ptr, q_b, q_h, q_n,
    mask_ptr, mask_b, mask_n,
    key_ptr, value_ptr, mass_ptr, bias_ptr,  # k̂, h (B·H, R, C, D'), λ (B·H, R, C), bias (B·H, R)
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
    peak, mass = tl.full((BLOCK_N,), float("-inf"), COMPUTE), tl.zeros((BLOCK_N,), COMPUTE)
    out = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in range(0, rows, BLOCK_N):
        inside = start + offset_n < rows
        key = load_rows(key_ptr + at * BLOCK_D, SPAN * BLOCK_D, start, offset_n, inside, BLOCK_D, BLOCK_D)
        value = load_rows(value_ptr + at * BLOCK_D, SPAN * BLOCK_D, start, offset_n, inside, BLOCK_D, BLOCK_D)
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
    key_ptr, value_ptr, mass_ptr, bias_ptr,  # k̂, h (B·H, R, C, D'), λ (B·H, R, C), bias (B·H, R)
    norm_ptr, delta_ptr, grad_q_ptr, grad_mass_ptr,  # (B·H, R, C), dq with D'
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
    grad_mass, grad_q = tl.zeros((BLOCK_N,), COMPUTE), tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in range(0, rows, BLOCK_N):
        inside = start + offset_n < rows
        key = load_rows(key_ptr + at * BLOCK_D, SPAN * BLOCK_D, start, offset_n, inside, BLOCK_D, BLOCK_D)
        value = load_rows(value_ptr + at * BLOCK_D, SPAN * BLOCK_D, start, offset_n, inside, BLOCK_D, BLOCK_D)
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
    grad_q *= HEAD_DIM**-0.5
    store_rows(grad_q_ptr + at * BLOCK_D, SPAN * BLOCK_D, first, offset_n, keep, grad_q, BLOCK_D, BLOCK_D)


@triton.jit
def columns_summaries_kernel(
    q_ptr, q_b, q_h, q_n,
    grad_ptr, grad_b, grad_h, grad_n,
    mask_ptr, mask_b, mask_n,
    key_ptr, value_ptr, mass_ptr, bias_ptr,  # k̂, h (B·H, R, C, D'), λ (B·H, R, C), bias (B·H, R)
    norm_ptr, delta_ptr, grad_key_ptr, grad_value_ptr, shift_ptr,  # (B·H, R, C), gradients with D'
    length, num_heads, rows,
    SPAN: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk̂, dh and −(dk̂·k̂ + dh·h) of a tile of summaries in one column; summaries are rows here."""
    b, h, column = place(tl.program_id(0), num_heads, SPAN)
    wide_h, head = h.to(tl.int64), b * num_heads + h
    first, offset_n = tl.program_id(1) * BLOCK_N, tl.arange(0, BLOCK_N)
    count = (length - column + SPAN - 1) // SPAN
    q_ptr += b * q_b + wide_h * q_h + column * q_n
    grad_ptr += b * grad_b + wide_h * grad_h + column * grad_n
    mask_ptr += b * mask_b + column * mask_n
    at, keep = head * rows * SPAN + column, first + offset_n < rows
    key = load_rows(key_ptr + at * BLOCK_D, SPAN * BLOCK_D, first, offset_n, keep, BLOCK_D, BLOCK_D)
    value = load_rows(value_ptr + at * BLOCK_D, SPAN * BLOCK_D, first, offset_n, keep, BLOCK_D, BLOCK_D)
    bias = tl.load(bias_ptr + head * rows + first + offset_n, mask=keep, other=NEVER)
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
    shift = tl.sum(grad_key.to(COMPUTE) * key.to(COMPUTE) + grad_value.to(COMPUTE) * value.to(COMPUTE), axis=1)
    store_rows(grad_key_ptr + at * BLOCK_D, SPAN * BLOCK_D, first, offset_n, keep, grad_key, BLOCK_D, BLOCK_D)
    store_rows(grad_value_ptr + at * BLOCK_D, SPAN * BLOCK_D, first, offset_n, keep, grad_value, BLOCK_D, BLOCK_D)
    tl.store(shift_ptr + at + (first + offset_n) * SPAN, -shift, mask=keep)


@triton.jit
def rows_backward_kernel(
    q_ptr, q_b, q_h, q_n,
    k_ptr, k_b, k_h, k_n,
    v_ptr, v_b, v_h, v_n,
    mask_ptr, mask_b, mask_n,
    mass_ptr, grad_mass_ptr, shift_ptr, grad_key_ptr, grad_value_ptr, from_columns_ptr,  # (B·H, R, C) or with D'
    grad_q_ptr, gq_b, gq_h, gq_n,
    grad_k_ptr, gk_b, gk_h, gk_n,
    grad_v_ptr, gv_b, gv_h, gv_n,
    length, num_heads, rows,
    SPAN: tl.constexpr, POOLED: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one row: dS_ij = p_ij (dh_i·v_j + dk̂_i·k_j − dh_i·h_i − dk̂_i·k̂_i + dλ_i); keys are rows here."""
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
    grad_key = load_rows(grad_key_ptr + at * BLOCK_D, BLOCK_D, 0, offset_n, used, BLOCK_D, BLOCK_D)
    grad_value = load_rows(grad_value_ptr + at * BLOCK_D, BLOCK_D, 0, offset_n, used, BLOCK_D, BLOCK_D)
    mass = tl.load(mass_ptr + at + offset_n, mask=used, other=-NEVER)
    shift = tl.load(shift_ptr + at + offset_n, mask=used, other=0.0)
    shift += tl.load(grad_mass_ptr + at + offset_n, mask=used, other=0.0)
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
    grad_q += load_rows(from_columns_ptr + at * BLOCK_D, BLOCK_D, 0, offset_n, real, BLOCK_D, BLOCK_D)
    store_rows(grad_q_ptr + b * gq_b + wide_h * gq_h, gq_n, start, offset_n, keep, grad_q, HEAD_DIM, BLOCK_D)
    store_rows(grad_k_ptr + b * gk_b + wide_h * gk_h, gk_n, start, offset_n, keep, grad_k, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr + b * gv_b + wide_h * gv_h, gv_n, start, offset_n, keep, grad_v, HEAD_DIM, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ launches


def allocate(q: Tensor, span: int) -> list[Tensor]:
    """Output (B, H, N, D), laid out as (B, N, H, D), and what the backward pass reads: norm, λ, k̂, h, bias."""
    batch, heads, length, dim = q.shape
    grid, dtype = (batch * heads, -(-length // span), span), state_dtype(q.dtype)
    return [
        q.new_empty(batch, length, heads, dim).transpose(1, 2),
        *(q.new_empty(grid, dtype=dtype) for _ in range(2)),
        *(q.new_empty(*grid, block_dim(dim)) for _ in range(2)),
        q.new_empty(grid[:2], dtype=dtype),
    ]


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
    out, norm, mass, key, value, bias = state = allocate(q, span)
    mask, sequences = mask_arguments(key_mask, q), shape.batch * shape.heads
    sizes = (shape.length, shape.heads, shape.spans)
    rows_kernel[(sequences * shape.spans,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask, key, value, mass, bias, *sizes, **flags, **rows
    )
    columns_kernel[(sequences * span, triton.cdiv(shape.spans, column.rows))](
        q, *strides(q), *mask, key, value, mass, bias, out, *strides(out), norm, *sizes, **flags, **columns
    )
    return state


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: list[Tensor],
    span: int, causal: bool, include_own: bool,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv in the layout of q, k, v."""
    shape = Shape(*q.shape, span)
    flags, rows, columns, column = _constants(q, shape, key_mask is not None)
    out, norm, mass, key, value, bias = state
    mask, sequences = mask_arguments(key_mask, q), shape.batch * shape.heads
    sizes = (shape.length, shape.heads, shape.spans)
    grid = (sequences * span, triton.cdiv(shape.spans, column.rows))
    delta, grad_mass, shift = (torch.empty_like(norm) for _ in range(3))
    from_columns = torch.empty(key.shape, dtype=norm.dtype, device=q.device)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    summaries = (key, value, mass, bias)
    columns_queries_kernel[grid](
        q, *strides(q), out, *strides(out), grad, *strides(grad), *mask, *summaries,
        norm, delta, from_columns, grad_mass, *sizes, **flags, **columns,
    )  # fmt: skip
    columns_summaries_kernel[grid](
        q, *strides(q), grad, *strides(grad), *mask, *summaries,
        norm, delta, grad_key, grad_value, shift, *sizes, **flags, **columns,
    )  # fmt: skip
    grads = [torch.empty_like(x) for x in (q, k, v)]
    grad_q, grad_k, grad_v = grads
    rows_backward_kernel[(sequences * shape.spans,)](
        q, *strides(q), k, *strides(k), v, *strides(v), *mask, mass, grad_mass, shift, grad_key, grad_value,
        from_columns, grad_q, *strides(grad_q), grad_k, *strides(grad_k), grad_v, *strides(grad_v),
        *sizes, **flags, **rows,
    )  # fmt: skip
    return grads
