"""This file is computing on one thread, so that results do not depend on their number."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside, and with as many as before after it; also a decorator.

    A matrix product, a convolution's gradient, a mean over a batch, or a decomposition that several
    threads share differs in its last bits by their number, and dividing by small numbers carries
    that up to the digits of float32. What runs on another device than the processor is left alone.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _libraries().limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@cache
def _libraries() -> Any:
    """Return what limits the threads of NumPy's and SciPy's BLAS."""
    import scipy.linalg  # noqa: F401 - a library is known once it is loaded
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
