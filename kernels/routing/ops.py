"""Routing's launches as operators, and their gradient."""

import torch
import triton as compiler
from torch import Tensor

from kernels.common.launch import state_dtype, unit_last_stride
from kernels.common.ops import refuse_create_graph, register_op
from kernels.routing import triton, triton_backward, triton_local, triton_score, triton_select


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, centroids: Tensor, window: int, local_window: int,
    causal: bool,
) -> list[Tensor]:  # fmt: skip
    heads, num_clusters, _ = centroids.shape
    chosen = triton_select.select(q, k, key_mask, centroids, window, causal)
    out = _output(q)
    lse, slots = triton.clusters(q, k, v, chosen, out, num_clusters, causal)
    if heads < q.shape[1]:
        local_lse = triton_local.local(q, k, v, key_mask, out, heads, local_window, causal)
    else:
        local_lse = lse.new_empty(0)
    *state, commitment, counts, sums = chosen
    return [out, commitment, counts, sums, *state, lse, slots, local_lse]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, centroids: Tensor, window: int, local_window: int,
    causal: bool,
) -> list[Tensor]:  # fmt: skip
    batch, _, length, dim = q.shape
    heads, num_clusters, _ = centroids.shape
    rows, window, wide = batch * heads, min(window, length), state_dtype(q.dtype)
    single = triton.cluster_flags(q, num_clusters, window, causal)[1]["SINGLE"]
    local_heads = q.shape[1] - heads
    words = compiler.cdiv(num_clusters, 32)
    return [
        _output(q),
        q.new_empty((), dtype=wide),
        q.new_empty(heads, num_clusters, dtype=wide),
        q.new_empty(heads, num_clusters, dim, dtype=wide),
        q.new_empty(2, rows, num_clusters, window, dtype=torch.int32),
        q.new_empty(2, rows, words, length, dtype=torch.int32),
        q.new_empty(2, rows, length + 1, dtype=torch.int32),
        q.new_empty(2, rows, length, dtype=torch.int32),
        q.new_empty(heads, num_clusters, dim, dtype=wide),
        q.new_empty((), dtype=wide),
        q.new_empty(rows, num_clusters, window, dtype=wide),
        q.new_empty(0) if single else q.new_empty(rows, num_clusters * window, dim),
        q.new_empty((batch * local_heads, length) if local_heads else (0,), dtype=wide),
    ]


def _output(q: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim).transpose(1, 2)


def _run_backward(
    grad: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor,
    index: Tensor, words: Tensor, offsets: Tensor, best: Tensor, centroids: Tensor, pull: Tensor, lse: Tensor,
    slots: Tensor, local_lse: Tensor, local_window: int, causal: bool,
) -> list[Tensor]:  # fmt: skip
    grads = [torch.empty_like(x) for x in (q, k, v)]
    triton_backward.clusters_backward(
        grad, grad_loss, q, k, v, key_mask, index, words, offsets, best, centroids, pull, lse, slots, grads, causal
    )
    if (heads := centroids.shape[0]) < q.shape[1]:
        triton_local.local_backward(grad, q, k, v, key_mask, out, local_lse, grads, heads, local_window, causal)
    return grads


def _backward(grad: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v)]


def _move(*_: object) -> None:
    pass


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask"
_STATE = (
    "Tensor out, Tensor index, Tensor words, Tensor offsets, Tensor best, Tensor centroids, Tensor pull, Tensor lse, "
    "Tensor slots, Tensor local_lse"
)
forward = register_op(
    "routing_forward",
    f"({_INPUTS}, Tensor centroids, int window, int local_window, bool causal) -> Tensor[]",
    _run_forward,
    _forward,
)
backward = register_op(
    "routing_backward",
    f"(Tensor grad, Tensor grad_loss, {_INPUTS}, {_STATE}, int local_window, bool causal) -> Tensor[]",
    _run_backward,
    _backward,
)
move = register_op(
    "routing_move",
    "(Tensor(a!) ema_counts, Tensor(b!) ema_sums, Tensor(c!) centroids, Tensor counts, Tensor sums, float decay) -> ()",
    triton_score.move,
    _move,
)


class _Routing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_mask, centroids, window, local_window, causal):
        out, commitment, counts, sums, *state = forward(q, k, v, key_mask, centroids, window, local_window, causal)
        ctx.save_for_backward(q, k, v, key_mask, out, *state)
        ctx.options = (local_window, causal)
        ctx.mark_non_differentiable(counts, sums)
        return out, commitment, counts, sums

    @staticmethod
    def backward(ctx, *grads):
        refuse_create_graph()
        grad, grad_loss = grads[:2]
        grads = backward(unit_last_stride(grad), grad_loss, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None, None


def select(q: Tensor, k: Tensor, centroids: Tensor, window: int, key_mask: Tensor | None) -> Tensor:
    """`kernels.routing.api.select` through the kernels."""
    q, k = (unit_last_stride(x) for x in (q, k))
    members = triton_select.select(q, k, key_mask, _state(centroids, q), window, False).members
    return members.long().unflatten(1, (q.shape[0], centroids.shape[0]))


def routing_attention(
    q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, window: int, local_window: int, key_mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`kernels.routing.api.routing_attention` through the kernels."""
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    return _Routing.apply(q, k, v, key_mask, _state(centroids, q), window, local_window, causal)


def _state(centroids: Tensor, q: Tensor) -> Tensor:
    return centroids.detach().to(state_dtype(q.dtype)).contiguous()
