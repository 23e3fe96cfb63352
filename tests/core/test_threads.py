"""Inside there is one thread, of torch and of BLAS; afterwards as many as before."""

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from mergekit_lit.core.threads import one_thread


def blas_threads() -> set[int]:
    return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}


def test_one_thread_puts_the_number_of_threads_back(threads):
    @one_thread()
    def fails() -> None:
        assert torch.get_num_threads() == 1
        assert blas_threads() == {1}
        raise ValueError("inside")

    with threads(2), threadpool_limits(2, user_api="blas"):
        with pytest.raises(ValueError, match="inside"):
            fails()
        assert torch.get_num_threads() == 2
