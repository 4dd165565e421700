"""Randomness as a function of (seed, purpose, step): nothing to save, nothing to lose on resume."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on nothing else (not on the machine, process or version)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_all(*parts: int | str) -> None:
    """Seed torch's generators of all devices with `derive_seed(*parts)`."""
    torch.manual_seed(derive_seed(*parts))
