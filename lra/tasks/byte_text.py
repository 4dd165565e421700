"""Text as a sequence of tokens: id = byte + 1 of its UTF-8 form, the head kept when it is too long."""

import numpy as np

VOCAB_SIZE = 257
"""256 bytes and padding; UTF-8 uses no byte above 244, so that ids fit into uint8."""


def place(text: bytes, row: np.ndarray) -> None:
    """Write the ids of a text's head into a zeroed row; ValueError for a byte that no UTF-8 text has."""
    head = np.frombuffer(text[: len(row)], np.uint8)
    if len(head) and head.max() == 255:
        raise ValueError("it holds a byte 255, which no UTF-8 text does")
    row[: len(head)] = head + np.uint8(1)
