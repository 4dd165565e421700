"""Entry to AdaMRA-R: dispatch over implementations, masks and dtypes made uniform."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.adamra import reference
from kernels.common.dispatch import check_impl
from kernels.common.inputs import check_choice
from kernels.common.layout import heads_last
from kernels.common.masks import real_tokens, real_values
from kernels.lln.moments import match_moments

IMPLEMENTATIONS = ("reference",)
FEATURE_MAPS = ("exponential", "elu", "softmax")
COMPRESSIONS = ("mean", "dwconv", "conv")
GATES = ("top1", "top1_unscaled", "soft", "fixed")


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
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each query reads the resolution that its router chose: o_i = g_i · y_i^{r(i)}; output and balance loss.

    q, k, v, key_mask   as in `attention.base`
    router              (H, R, D), or None with gate="fixed"
    rates               tokens fused into one, for each of the R resolutions
    key_weights         per resolution None (mean), (H, rate, D) or (H, rate, D, D); likewise value_weights
    scales              α and β of the exponential map, each (R,), without gradient; None with the other maps
    return              out (B, H, N, D) in the contract's form, and the unweighted balance loss, a scalar
    """
    check_choice(FEATURE_MAPS, feature_map=feature_map)
    check_choice(GATES, gate=gate)
    check_impl(impl, IMPLEMENTATIONS, "adamra")
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
    return heads_last(out, key_mask, q.dtype), balance


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`spreads`, and the scales α, β they give, per resolution, (R,) each; no gradient."""
    sigmas = spreads(q, k, key_mask, rates=rates, key_weights=key_weights)
    return *sigmas, *match_moments(*sigmas, constants)


def shares(q: Tensor, key_mask: Tensor | None, router: Tensor) -> Tensor:
    """Share of the real queries that each resolution got, (H, R); zero without a real query."""
    real = real_tokens(q, key_mask)
    with torch.no_grad():
        _, chosen = reference.route(real_values(q, real), router)
    return (chosen & real[:, None, :, None]).sum((0, 2)) / real.sum().clamp(min=1)
