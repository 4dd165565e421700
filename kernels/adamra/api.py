"""Entry to AdaMRA-R: dispatch over implementations, masks and dtypes made uniform."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.adamra import reference
from kernels.common.dispatch import choose_impl
from kernels.common.inputs import check_choice
from kernels.common.layout import heads_last
from kernels.common.masks import real_tokens, real_values
from kernels.lln.moments import match_moments

IMPLEMENTATIONS = ("reference", "triton")
FEATURE_MAPS = ("exponential", "elu", "softmax")
COMPRESSIONS = ("mean", "dwconv", "conv")
GATES = ("top1", "top1_unscaled", "soft", "fixed")


LARGEST_RATE = 128
"""Longest window of the kernels: it lies in one tile."""


def kernels_refuse(rates: Sequence[int], feature_map: str, gate: str, mean: bool) -> str | None:
    """Why the Triton kernels do not have this variant, or None; `mean` says that windows are fused by their mean."""
    if feature_map != "exponential":
        return f"has feature_map=exponential only, got {feature_map}"
    if not mean:
        return "has compress=mean only"
    if gate == "soft":
        return "has gate=top1, top1_unscaled and fixed, got soft"
    if any(rate & (rate - 1) or rate > LARGEST_RATE for rate in rates):
        return f"takes rates that are powers of two <= {LARGEST_RATE}, got {list(rates)}"
    return None


def adamra(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    router: Tensor | None,
    rates: Sequence[int],
    key_weights: Sequence[Tensor | None],
    value_weights: Sequence[Tensor | None],
    scales: tuple[Tensor, Tensor] | None = None,
    feature_map: str = "exponential",
    gate: str = "top1",
    balance_weight: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each query reads the resolution that its router chose: o_i = g_i · y_i^{r(i)}; output and balance loss.

    q, k, v, key_mask   as in `attention.base`
    router              (H, R, D), or None with gate="fixed"
    rates               tokens fused into one, for each of the R resolutions
    key_weights         per resolution None (mean), (H, rate, D) or (H, rate, D, D); likewise value_weights
    scales              α and β of the exponential map, each (R,), without gradient; None with the other maps
    balance_weight      factor of the balance loss; compiled into the kernels, so not one to change at every step
    return              out (B, H, N, D) in the contract's form, and the weighted balance loss, a scalar
    """
    check_choice(FEATURE_MAPS, feature_map=feature_map)
    check_choice(GATES, gate=gate)
    if feature_map == "exponential" and scales is None:
        raise ValueError("attention.feature_map=exponential needs scales: α and β of every resolution, see `measure`")
    refusal = kernels_refuse(rates, feature_map, gate, all(w is None for w in (*key_weights, *value_weights)))
    if choose_impl(impl, q, IMPLEMENTATIONS, "adamra", refusal) == "triton":
        from kernels.adamra import ops  # Triton is needed only here

        assert scales is not None  # the kernels have the exponential map alone
        return ops.adamra(q, k, v, key_mask, router, scales, list(rates), gate, balance_weight)
    real = real_tokens(q, key_mask)
    out, balance = reference.adamra(
        real_values(q, real),
        real_values(k, real),
        real_values(v, real),
        real,
        router=router,
        rates=rates,
        key_weights=key_weights,
        value_weights=value_weights,
        scales=scales,
        feature_map=feature_map,
        gate=gate,
    )
    return heads_last(out, key_mask, q.dtype), balance_weight * balance


def spreads(
    q: Tensor, k: Tensor, key_mask: Tensor | None, *, rates: Sequence[int], key_weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """σ of the queries and of the compressed keys, per resolution, (R,) each; the input of `match_moments`."""
    real = real_tokens(q, key_mask)
    with torch.no_grad():
        return reference.spreads(real_values(q, real), real_values(k, real), real, rates, key_weights)


def measure(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    constants: tuple[float, float],
    *,
    rates: Sequence[int],
    key_weights: Sequence[Tensor | None],
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`spreads`, and the scales α, β they give, per resolution, (R,) each; no gradient."""
    refusal = kernels_refuse(rates, "exponential", "fixed", all(w is None for w in key_weights))
    if choose_impl(impl, q, IMPLEMENTATIONS, "adamra", refusal) == "triton":
        from kernels.lln import ops

        return ops.measure(q, k, key_mask, tuple(rates), constants)
    sigmas = spreads(q, k, key_mask, rates=rates, key_weights=key_weights)
    return *sigmas, *match_moments(*sigmas, constants)


def shares(q: Tensor, key_mask: Tensor | None, router: Tensor) -> Tensor:
    """Share of the real queries that each resolution got, (H, R); zero without a real query."""
    real = real_tokens(q, key_mask)
    with torch.no_grad():
        _, chosen = reference.route(real_values(q, real), router)
    return (chosen & real[:, None, :, None]).sum((0, 2)) / real.sum().clamp(min=1)
