"""Entry to LLN attention: dispatch over implementations, masks and dtypes made uniform."""

from torch import Tensor

from kernels.common.dispatch import choose_impl
from kernels.common.layout import heads_last
from kernels.common.masks import real_tokens, real_values
from kernels.lln import reference
from kernels.lln.moments import match_moments, spread

IMPLEMENTATIONS = ("reference", "triton")
DIAGS = ("none", "average", "learnable_scale", "learnable_ratio")


def lln(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    alpha: Tensor,
    beta: Tensor,
    mix: tuple[Tensor | float, Tensor | float] | None = None,
    causal: bool = False,
    impl: str = "auto",
) -> Tensor:
    """o_i = Σ_j κ_ij v_j / Σ_j κ_ij with κ_ij = Σ_l exp(α q_il + β k_jl); arXiv 2311.13541.

    q, k, v, key_mask   as in `attention.base`
    alpha, beta         positive scales, a scalar tensor or (1,) each; no gradient reaches them
    mix                 None, or the weights (of LLN, of Diag) of o = w₁ o_LLN + w₂ o_Diag: numbers or tensors that
                        broadcast to (B, H, N, D). Diag is softmax(q kᵀ / √D) inside consecutive blocks of D tokens
    causal              j ≤ i in both branches; α and β must then not come from this call
    return              (B, H, N, D) in the contract's form
    """
    refusal = "has no causal form" if causal else None
    if choose_impl(impl, q, IMPLEMENTATIONS, "lln", refusal) == "triton":
        from kernels.lln import ops  # Triton is needed only here

        return ops.lln(q, k, v, key_mask, alpha.detach(), beta.detach(), mix)
    real = real_tokens(q, key_mask)
    q_real, k_real, v_real = real_values(q, real), real_values(k, real), real_values(v, real)
    out = reference.lln(q_real, k_real, v_real, real, alpha=alpha.detach(), beta=beta.detach(), mix=mix, causal=causal)
    return heads_last(out, key_mask, q.dtype)


def spreads(q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """σ of the real queries and of the real keys of a call, (1,) each; the input of `match_moments`."""
    real = real_tokens(q, key_mask)
    return spread(q, real).unsqueeze(0), spread(k, real).unsqueeze(0)


def measure(
    q: Tensor, k: Tensor, key_mask: Tensor | None, constants: tuple[float, float], *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """σ of the real queries and of the real keys of a call, and the scales α, β they give, (1,) each; no gradient."""
    if choose_impl(impl, q, IMPLEMENTATIONS, "lln") == "triton":
        from kernels.lln import ops

        return ops.measure(q, k, key_mask, (1,), constants)
    sigmas = spreads(q, k, key_mask)
    return *sigmas, *match_moments(*sigmas, constants)
