"""The fixed vocabulary of ListOps: ids never depend on the data, the process or the split."""

TOKENS = ("<pad>", "[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789")
"""Token of each id; parentheses carry nothing that the brackets do not, and are removed."""

IDS = {token: index for index, token in enumerate(TOKENS) if index > 0}

PAD, MIN, MAX, MED, SM, CLOSE, ZERO = range(7)
"""Digit d has id ZERO + d."""
