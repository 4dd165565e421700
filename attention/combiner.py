"""Combiner: full attention through span summaries (Ren et al., NeurIPS 2021, arXiv 2107.05768)."""

from torch import Tensor

from attention.base import Attention
from attention.registry import register
from kernels.combiner import IMPLEMENTATIONS, check_options, combiner, kernels_refuse


@register("combiner", combiner_logsparse={"pattern": "logsparse"}, combiner_axial={"pattern": "axial"})
class CombinerAttention(Attention):
    """Each query sees some tokens directly and the rest as regions; a region acts as one key and one value.

        out_i = [ Σ_{j ∈ Ω⁰} exp(τ q_i·k_j) v_j + Σ_r exp(τ q_i·k̂_r) h_r ] / [ the same without v and h ]
        k̂_r = max-pooled keys,  h_r = Σ_{j ∈ Ωʳ} softmax_j(τ q̂_r·k_j) v_j,  q̂_r = max-pooled queries,  τ = 1/√D

    pattern            Ω⁰, the direct set, and the regions; causal keeps of each what lies at or before i
        "fixed"             own span; every other span (section 4.1)
        "logsparse"         the token itself; dyadic spans by the binary expansion of i (4.2)
        "axial"             row-major: own row; every other row, as seen from the query's column (4.3)
        "axial_vertical"    own row and column; what they leave of every other column (4.3)
        "axial_horizontal"  own row and column; every other row without the query's column (4.3)
    segment_length     span length of Fixed, row length of the Axial patterns (an image's width); Logsparse has none
    include_own_span   Fixed and Axial: a query also sees the summary of its own span, counting it twice, as the
                       bidirectional form of the released code does; the paper's partition excludes it

    The paper's bidirectional Logsparse and Axial stand in appendices that we do not have. Ours: Logsparse adds the
    mirrored partition of the suffix; Axial takes all other rows or columns, not only those before the query.
    The details, and what padding means, are in `kernels.combiner.reference`.
    """

    implementations = IMPLEMENTATIONS

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_length: int,
        causal: bool = False,
        impl: str = "auto",
        pattern: str = "fixed",
        segment_length: int = 64,
        include_own_span: bool = False,
    ):
        check_options(pattern=pattern, segment_length=segment_length, include_own_span=include_own_span, causal=causal)
        refusal = kernels_refuse(pattern, segment_length, include_own_span, causal)
        if refusal is not None:
            if impl == "triton":
                raise ValueError(f"attention.impl=triton of combiner {refusal}; use attention.impl=reference")
            self.implementations = ("reference",)
        super().__init__(num_heads, head_dim, max_length, causal, impl)
        self.pattern, self.segment_length, self.include_own_span = pattern, segment_length, include_own_span

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return combiner(
            q,
            k,
            v,
            key_mask,
            pattern=self.pattern,
            segment_length=self.segment_length,
            include_own_span=self.include_own_span,
            causal=self.causal,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern!r}, segment_length={self.segment_length}"
