"""BatchNorm statistics of a merge with masks: each task's are those of its own model."""

import numpy as np
import pytest
import torch

from mergekit_lit.core.experts import Merged
from mergekit_lit.core.params import add
from mergekit_lit.data.splits import Images
from mergekit_lit.lit.recalibration import recalibrate, statistics_on
from mergekit_lit.models.backbones import load_base


def test_statistics_follow_each_tasks_mask():
    backbone, base = load_base("resnet@random:0", image_size=8)
    names = [name for name, info in base.structure.items() if info.is_merged]
    draw = torch.Generator().manual_seed(0)
    step = {n: 0.1 * torch.randn(base.params[n].shape, generator=draw) for n in names}
    shared = add(base.params, step)
    merged = Merged(
        shared=shared,
        structure=base.structure,
        heads={"all": {}, "none": {}},
        masks={
            "all": {n: torch.ones_like(base.params[n], dtype=torch.bool) for n in names},
            "none": {n: torch.zeros_like(base.params[n], dtype=torch.bool) for n in names},
        },
        base={n: base.params[n] for n in names},
    )
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
    images = Images(pixels, np.zeros(24, dtype=np.int64))
    found = recalibrate(
        merged, {"all": images, "none": images}, backbone=backbone, per_task=True
    ).statistics
    for task, params in (("all", shared), ("none", base.params)):
        expected = statistics_on([images], params, backbone=backbone)
        assert all(torch.equal(found[task][name], tensor) for name, tensor in expected.items())
    # One set of statistics would fit neither model.
    with pytest.raises(ValueError, match=r"one model, but .* Use 'recalibrate-per-task'"):
        recalibrate(merged, {"all": images, "none": images}, backbone=backbone, per_task=False)
