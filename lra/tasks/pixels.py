"""Grey images as sequences of tokens, in raster order.

black="padding"   ids are the grey values, so black is id 0, which is padding: no attention sees it. So does the code
                  of every small setting; two thirds of a Pathfinder image vanish
black="pixel"     ids are the grey values + 1
"""

from typing import Any

import numpy as np

BLACK = ("padding", "pixel")


def vocab_size(black: str) -> int:
    return 256 if black == "padding" else 257


def dtype(black: str) -> type[np.uint8] | type[np.int16]:
    return np.uint8 if black == "padding" else np.int16


def tokens(images: np.ndarray, black: str) -> np.ndarray:
    """(n, height, width) uint8 → (n, height · width) ids."""
    flat = images.reshape(len(images), -1)
    return flat if black == "padding" else flat.astype(np.int16) + np.int16(1)


def grey(images: np.ndarray) -> np.ndarray:
    """(…, 3) uint8 RGB → (…) uint8: ITU-R 601 luma in 16-bit fixed point, (19595 R + 38470 G + 7471 B + 2¹⁵) / 2¹⁶."""
    weighted: Any = images.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighted + np.uint32(1 << 15)) >> np.uint32(16)).astype(np.uint8)
