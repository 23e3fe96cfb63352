"""Seeds: the same in every process, different for every key."""

import os
import subprocess
import sys

import pytest
import torch

from mergekit_lit.core.seeds import derive_seed, generator

PRINT_SEEDS = (
    "from mergekit_lit.core.seeds import derive_seed as d;"
    "print([d(0), d(1, 'order', 3), d(7, 'block.weight', 'mnist')])"
)


@pytest.mark.slow
def test_same_in_processes_with_different_hash_seeds():
    def seeds(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", PRINT_SEEDS],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    here = str(
        [derive_seed(0), derive_seed(1, "order", 3), derive_seed(7, "block.weight", "mnist")]
    )
    assert seeds("1") == seeds("2") == here


def test_known_values():
    """Values that every platform and version must keep: old runs are reproduced by them."""
    assert derive_seed(0) == 3456079177858693020
    assert derive_seed(1, "order", 3) == 465549127510907468


def test_keys_do_not_run_into_each_other():
    keys = [(), ("a",), ("a", "b"), ("ab",), ("a", 1), ("a", "1"), (1, "a"), ("a1",), ("",)]
    assert len({derive_seed(0, *key) for key in keys}) == len(keys)
    assert derive_seed(0, "a") != derive_seed(1, "a")


def test_range():
    seeds = [derive_seed(seed, "key") for seed in (0, -5, 2**70)]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_is_its_own_stream():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = torch.rand(4, generator=generator(0, "a"))
    assert torch.equal(first, torch.rand(4, generator=generator(0, "a")))
    assert not torch.equal(first, torch.rand(4, generator=generator(0, "b")))
    assert torch.equal(before, torch.get_rng_state())
