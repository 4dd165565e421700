"""Combiner attention: options, dispatch, the contract's form of the result."""

from torch import Tensor

from kernels.combiner import reference
from kernels.common.dispatch import choose_impl
from kernels.common.inputs import check_flag, check_positive
from kernels.common.layout import heads_last

IMPLEMENTATIONS = ("reference", "triton")
PATTERNS = ("fixed", "logsparse", "axial", "axial_vertical", "axial_horizontal")
REPEATABLE = ("fixed", "axial")
"""Patterns whose direct set is exactly one summarised region, so that `include_own_span` has a meaning."""


LONGEST_SPAN = 128
"""Longest span of the kernels: it lies in one tile."""


def kernels_refuse(pattern: str, segment_length: int, include_own_span: bool, causal: bool) -> str | None:
    """Why the Triton kernels do not have this variant, or None."""
    if pattern not in ("fixed", "logsparse", "axial"):
        return f"has pattern=fixed, logsparse and axial only, got {pattern}"
    if pattern != "logsparse" and segment_length > LONGEST_SPAN:
        return f"takes segment_length <= {LONGEST_SPAN}, got {segment_length}"
    if pattern == "axial" and causal:
        return "has no causal form of pattern=axial"
    if pattern == "axial" and include_own_span:
        return "has no include_own_span=True for pattern=axial"
    return None


def check_options(*, pattern: str, segment_length: int, include_own_span: bool, causal: bool) -> None:
    """Raise ValueError, in one line, for options that do not exist or contradict each other."""
    if pattern not in PATTERNS:
        raise ValueError(f"attention.pattern={pattern} is unknown to Combiner; use one of {', '.join(PATTERNS)}")
    check_positive(segment_length=segment_length)
    check_flag(include_own_span=include_own_span)
    if include_own_span and pattern not in REPEATABLE:
        raise ValueError(
            f"attention.include_own_span=True is not defined for pattern={pattern}, where no region is a query's own; "
            f"it is for {', '.join(REPEATABLE)}"
        )
    if include_own_span and causal:
        raise ValueError(
            "attention.include_own_span=True is refused with causal=True: the summary of a query's own span "
            "contains its future"
        )


def combiner(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    pattern: str = "fixed",
    segment_length: int = 64,
    include_own_span: bool = False,
    causal: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Combiner attention, see `kernels.combiner.reference` for the formula and the patterns.

    q, k, v            (B, H, N, D), one float dtype
    key_mask           (B, N) bool, True = real token; None = all real
    pattern            one of PATTERNS
    segment_length     span length of Fixed, row length of the Axial patterns, in tokens; Logsparse has none
    include_own_span   a bidirectional query sees its own span's summary too, beside its tokens (the released code)
    returns            (B, H, N, D), dtype of q, (B, N, H, D) in memory, rows of padded queries zero
    raises             ValueError for impossible options
    """
    check_options(pattern=pattern, segment_length=segment_length, include_own_span=include_own_span, causal=causal)
    refusal = kernels_refuse(pattern, segment_length, include_own_span, causal)
    if choose_impl(impl, q, IMPLEMENTATIONS, "combiner", refusal) == "triton":
        from kernels.combiner import ops  # Triton is needed only here

        return ops.combiner(
            q,
            k,
            v,
            key_mask,
            pattern=pattern,
            segment_length=segment_length,
            include_own_span=include_own_span,
            causal=causal,
        )
    out = reference.combiner(
        q,
        k,
        v,
        key_mask,
        pattern=pattern,
        segment_length=segment_length,
        include_own_span=include_own_span,
        causal=causal,
    )
    return heads_last(out, key_mask, q.dtype)
