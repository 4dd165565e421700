"""Linear log-normal attention."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from attention.base import Attention
from attention.moments import STATISTICS, MomentMatching
from attention.registry import register
from kernels.common.inputs import check_choice
from kernels.lln import DIAGS, IMPLEMENTATIONS, lln, measure
from kernels.lln.moments import CONSTANTS, moment_constants


@register("lln", lln_diag={"diag": "average"})
class LLN(Attention):
    """Linear attention whose weights are spread like those of softmax: LLN, and LLN+Diag.

        κ_ij = Σ_l exp(α q_il + β k_jl),   o_i = Σ_j κ_ij v_j / Σ_j κ_ij

    α and β match var(ln P) to that of softmax attention (`kernels.lln.moments`). Diag adds exact softmax inside
    blocks of D tokens. Nahshan, Kampeas, Haleva, "Linear Log-Normal Attention with Unbiased Concentration" (ICLR
    2024, arXiv 2311.13541), after the authors' code, whose eps is replaced by an exact form.

    diag          "none" | "average": o = (o_LLN + o_Diag) / 2 | "learnable_scale": o = r o_LLN + p o_Diag
                  | "learnable_ratio": o = r o_LLN + (1 − r) o_Diag; r, p per head and feature, from 0.5
    constants     "published": (a, b) of the authors' code, fitted to a head dimension of 64 | "head_dim": the pair
                  fitted to this one, for 8 ≤ D ≤ 128
    statistics    "batch" | "running" | "frozen", see `attention.moments.MomentMatching`. σ is over the entries of all
                  real tokens of the call; with "batch" a sequence therefore depends on its batch mates

    Causal use needs statistics="frozen": σ of a call sees the future of every position.
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
        diag: str = "none",
        constants: str = "published",
        statistics: str = "batch",
    ):
        if causal:
            self.implementations = ("reference",)  # there are no causal kernels
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        check_choice(DIAGS, diag=diag)
        check_choice(CONSTANTS, constants=constants)
        check_choice(STATISTICS, statistics=statistics)
        if causal and statistics != "frozen":
            raise ValueError(
                f"attention.statistics={statistics} sees the future; attention.causal=True needs statistics=frozen"
            )
        self.diag = diag
        self.moments = MomentMatching(moment_constants(constants, head_dim), statistics)
        self.r = self._weight() if diag.startswith("learnable") else None
        self.p = self._weight() if diag == "learnable_scale" else None

    def _weight(self) -> nn.Parameter:
        return nn.Parameter(torch.full((1, self.num_heads, 1, self.head_dim), 0.5))

    def _mix(self) -> tuple[Tensor | float, Tensor | float] | None:
        """Weights of the LLN and the Diag branch."""
        if self.diag == "none":
            return None
        if self.r is None:
            return 0.5, 0.5
        return self.r, 1 - self.r if self.p is None else self.p

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        alpha, beta = self.moments(lambda constants: measure(q, k, key_mask, constants, impl=self.impl))
        return lln(q, k, v, key_mask, alpha=alpha, beta=beta, mix=self._mix(), causal=self.causal, impl=self.impl)

    def diagnostics(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> dict[str, float]:
        """The scales of the call, `alpha` and `beta`."""
        alpha, beta = self.moments(lambda constants: measure(q, k, key_mask, constants, impl=self.impl))
        return {"alpha": float(alpha), "beta": float(beta)}
