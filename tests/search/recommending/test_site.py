"""Where recommendations are tried out: no test images, weights of experts, and the pace."""

import math
from dataclasses import replace

import pytest

from mergekit_lit.search.recommending.pacing import measured_pace
from mergekit_lit.search.recommending.site import Setting, Site
from mergekit_lit.search.recommending.space import Space, Way

BASE = "timm/test_vit@random:0"


@pytest.fixture
def setting(tiny_suite):
    return Setting(
        suite=tiny_suite,
        tasks=("dots", "stripes"),
        backbone=BASE,
        head="frozen-ncm",
        method="average",
        space=Space(optimizer=["sgd"], lr=[0.01], batch=[4, 8], steps=[2, 4], warmup_steps=0),
        images=16,
        root=None,
        val_share=0.2,
        reserve=4,
        seed=0,
    )


def test_no_test_image_is_there_to_be_looked_at(setting, tmp_path):
    site = Site(setting, tmp_path)
    assert len(site.data("dots").test) == 0
    assert len(site.data("dots").val) == 24
    assert len(site.data("dots", 0.5).train) == len(site.data("dots").train) // 2


def test_shares_are_of_n_where_it_is_given(setting):
    assert setting.split(0.5).train_share == 0.5
    few = replace(setting, n=30)
    assert (few.split(0.5).n, few.split(0.5).train_share) == (15, 1.0)


@pytest.mark.slow
def test_an_expert_of_a_sample_weighs_as_in_the_average_of_all(setting, tmp_path):
    site, way = Site(setting, tmp_path), Way("sgd", 0.01, 8, 1.0)
    files = [site.train(way, task, (2, 4), 2)[2] for task in setting.tasks]
    two = site.merged(files)[1]
    four = Site(replace(setting, tasks=("dots", "stripes", "c", "d")), tmp_path).merged(files)[1]
    assert two.facts["coefficients"] == [0.5, 0.5]
    assert four.facts["coefficients"] == [0.25, 0.25]


@pytest.mark.slow
def test_a_training_goes_on_from_where_it_paused_to_the_same_bytes(setting, tmp_path):
    way = Way("sgd", 0.01, 8, 1.0)
    whole = Site(setting, tmp_path / "whole").train(way, "dots", (2, 4, 6), 6)
    site = Site(setting, tmp_path / "parts")
    first = site.train(way, "dots", (2, 4, 6), 2)
    assert list(first) == [2]
    later = Site(setting, tmp_path / "parts").train(way, "dots", (2, 4, 6), 6)
    for k, path in later.items():
        assert path.read_bytes() == whole[k].read_bytes()


@pytest.mark.slow
def test_the_pace_is_measured_in_seconds(setting):
    pace = measured_pace(setting)
    assert pace.unit == "seconds"
    numbers = [value for value in vars(pace).values() if isinstance(value, float)]
    assert all(math.isfinite(value) and value >= 0 for value in numbers)
    assert pace.start > 0
    assert pace.training(Way("sgd", 0.1, 8, 1.0), 100) > pace.start
