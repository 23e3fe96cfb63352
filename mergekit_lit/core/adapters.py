"""This file is the adapter that a task may keep behind a merged backbone."""

from torch import Tensor

from mergekit_lit.core.params import Params


def adapted(adapter: Params, features: Tensor) -> Tensor:
    """Return features z (b, d) as a task's head takes them.

    z - Up ReLU(Down z); without an adapter, z

    Args:
        adapter: `down` (r, d) and `up` (d, r), or empty.
        features: (b, d).
    """
    if not adapter:
        return features
    inner = (features @ adapter["down"].to(features.dtype).T).relu()
    return features - inner @ adapter["up"].to(features.dtype).T
