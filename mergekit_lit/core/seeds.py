"""This file derives random streams from names, so that no result depends on an order of calls."""

import hashlib

import torch


def derive_seed(seed: int, *key: str | int) -> int:
    """Return a seed in [0, 2**63) that depends on `seed` and the parts of `key` alone.

    The parts are hashed with SHA-256 (Python's own `hash` differs from process to process).
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in key)])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *key: str | int) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed(seed, *key)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *key))
