"""Adaptive multi-resolution attention, as reconstructed here: AdaMRA-R."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from attention.base import Attention
from attention.moments import STATISTICS, MomentMatching
from attention.registry import register
from kernels.adamra import COMPRESSIONS, FEATURE_MAPS, GATES, IMPLEMENTATIONS, adamra, kernels_refuse, measure, shares
from kernels.common.inputs import check_choice, check_positive
from kernels.lln.moments import moment_constants


@register("adamra")
class AdaMRA(Attention):
    """Every query picks the resolution at which it looks at the sequence: AdaMRA-R, a reconstruction.

        k'_r, v'_r = windows of c_r keys and values, fused                 r = 1 … R
        y_i^r      = linear attention of q_i over k'_r, v'_r
        p_i        = softmax(W q_i),   r(i) = argmax_r p_ir  (lowest index at a tie)
        o_i        = p_i,r(i) · y_i^r(i)

    Zhang et al., "Adaptive Multi-Resolution Attention with Linear Complexity" (arXiv 2108.04962), published no
    code. From the abstract come: resolutions from coarse to fine, a choice by the query, kernel attention in linear
    time. Everything else is this project's choice: the compression, the rates, the router's form and its input (the
    projected query), the gate, the balance loss, the feature map. Results are those of the reconstruction.

    rates           c_r, tokens fused into one, one for each resolution
    feature_map     "exponential": LLN's map, exp(αq) and exp(βk'_r), with moment-matched scales per resolution
                    | "elu": elu + 1 on both sides | "softmax": over features for q, over windows for k'
    compress        how a window of keys or values is fused, after the projection: "mean" of its real tokens
                    | "dwconv": a learned weight per head, position and channel | "conv": a learned D×D matrix per
                    head and position. Learned weights start at the mean and are separate for keys and values
    gate            "top1": the output is multiplied by the chosen probability | "top1_unscaled": it is not, and only
                    the balance loss trains the router | "soft": all resolutions, mixed by p | "fixed": no router,
                    head h always at resolution h mod R
    balance_weight  weight of the auxiliary loss R Σ_r f_r P_r (Switch Transformer), per head, averaged over heads;
                    f_r is the share of real queries at resolution r, P_r their mean probability of it
    statistics      "batch" | "running" | "frozen", see `attention.moments.MomentMatching`; for the exponential map.
                    σq is over the entries of all real queries of the call, σk of resolution r over those of its
                    fused keys, windows without a real token left out; α_r and β_r follow with the published constants

    Causal use is refused: a window that holds the query's own future would leak it.
    """

    implementations = IMPLEMENTATIONS
    batch_independent_options: ClassVar = {"statistics": "frozen"}

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_length: int,
        causal: bool = False,
        impl: str = "auto",
        rates: Sequence[int] = (2, 8, 32),
        feature_map: str = "exponential",
        compress: str = "mean",
        gate: str = "top1",
        balance_weight: float = 0.01,
        statistics: str = "batch",
    ):
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        if causal:
            raise ValueError("attention.causal=True is refused by adamra: a fused window would leak the query's future")
        _check_rates(rates)
        check_choice(FEATURE_MAPS, feature_map=feature_map)
        check_choice(COMPRESSIONS, compress=compress)
        check_choice(GATES, gate=gate)
        check_choice(STATISTICS, statistics=statistics)
        _check_weight(balance_weight)
        refusal = kernels_refuse(rates, feature_map, gate, compress == "mean")
        if refusal is not None:
            if impl == "triton":
                raise ValueError(f"attention.impl=triton of adamra {refusal}; use attention.impl=reference")
            self.implementations = ("reference",)
        self.rates, self.feature_map, self.compress, self.gate = tuple(rates), feature_map, compress, gate
        self.balance_weight = float(balance_weight)
        self.router = None if gate == "fixed" else nn.Parameter(0.02 * torch.randn(num_heads, len(rates), head_dim))
        self.key_weights, self.value_weights = self._compression(), self._compression()
        self.moments = None
        if feature_map == "exponential":
            self.moments = MomentMatching(moment_constants("published", head_dim), statistics, len(rates))

    def _compression(self) -> nn.ParameterList | None:
        """Weights of one operand at every resolution, at the mean: 1/c, or the identity times 1/c."""
        if self.compress == "mean":
            return None
        one = torch.ones(self.head_dim) if self.compress == "dwconv" else torch.eye(self.head_dim)
        return nn.ParameterList(
            nn.Parameter((one / rate).expand(self.num_heads, rate, *one.shape).clone()) for rate in self.rates
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        mean = [None] * len(self.rates)
        key_weights = mean if self.key_weights is None else list(self.key_weights)
        value_weights = mean if self.value_weights is None else list(self.value_weights)
        scales = None
        if self.moments is not None:
            scales = self.moments(
                lambda constants: measure(
                    q, k, key_mask, constants, rates=self.rates, key_weights=key_weights, impl=self.impl
                )
            )
        out, self._auxiliary = adamra(
            q,
            k,
            v,
            key_mask,
            router=self.router,
            rates=self.rates,
            key_weights=key_weights,
            value_weights=value_weights,
            scales=scales,
            feature_map=self.feature_map,
            gate=self.gate,
            balance_weight=self.balance_weight,
            impl=self.impl,
        )
        return out

    def shares(self, q: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Share of the real queries at each resolution, (H, R): what the router does, for the instruments."""
        if self.router is None:
            heads = torch.arange(self.num_heads, device=q.device) % len(self.rates)
            return nn.functional.one_hot(heads, len(self.rates)).float()
        return shares(q, key_mask, self.router)

    def diagnostics(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> dict[str, float]:
        """Share of the real queries at each resolution, as `queries_at_rate_8`."""
        shares = self.shares(q, key_mask).mean(0).tolist()
        return {f"queries_at_rate_{rate}": share for rate, share in zip(self.rates, shares, strict=True)}


def _check_rates(rates: Sequence[int]) -> None:
    if isinstance(rates, str) or not isinstance(rates, Sequence) or not rates:
        raise ValueError(f"attention.rates={rates!r} must be a list of positive integers, one for each resolution")
    check_positive(**{f"rates[{r}]": rate for r, rate in enumerate(rates)})


def _check_weight(weight: float) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"attention.balance_weight={weight!r} must be a finite number >= 0")
