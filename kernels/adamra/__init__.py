"""Adaptive multi-resolution attention (AdaMRA-R, a reconstruction)."""

from kernels.adamra.api import (
    COMPRESSIONS,
    FEATURE_MAPS,
    GATES,
    IMPLEMENTATIONS,
    adamra,
    kernels_refuse,
    measure,
    shares,
    spreads,
)

__all__ = [
    "COMPRESSIONS",
    "FEATURE_MAPS",
    "GATES",
    "IMPLEMENTATIONS",
    "adamra",
    "kernels_refuse",
    "measure",
    "shares",
    "spreads",
]
