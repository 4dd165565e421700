"""A table look-up whose gradient is deterministic and does not wait in line for popular rows."""

from kernels.embedding.api import embedding

__all__ = ["embedding"]
