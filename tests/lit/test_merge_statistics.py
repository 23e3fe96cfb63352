"""BatchNorm statistics for heads and evaluation: of which images, and the same everywhere."""

import copy

import numpy as np

from mergekit_lit.core.params import content_hash
from mergekit_lit.data.splits import Images
from mergekit_lit.lit.evaluation import entries_for
from mergekit_lit.lit.passes import statistics_of
from mergekit_lit.lit.recalibration import calibration_images, task_statistics


def test_evaluation_estimates_the_statistics_that_the_head_was_fitted_under(family, merge_data):
    backbone, base, experts = family
    (data, _) = merge_data().task_data
    start = copy.deepcopy(backbone).eval()
    start.load_state_dict(dict(base.params))
    expected = {**base.params, **task_statistics(start, data)}
    heads = {"dots": experts[0].head}
    (entry,) = entries_for(
        {"base": base}, data, backbone, heads=heads, batch_norm="recalibrate-per-task"
    )
    assert content_hash(entry.params) == content_hash(expected)


def test_large_tasks_are_calibrated_on_a_seeded_part(small_task):
    train = small_task(40).train
    assert calibration_images(train, "dots", count=40) is train
    parts = [calibration_images(train, "dots", count=10, seed=seed).x[:] for seed in (0, 0, 1)]
    assert len(parts[0]) == 10
    assert np.array_equal(parts[0], parts[1])
    assert not np.array_equal(parts[0], parts[2])


def test_pooled_statistics_are_those_of_all_images_at_once(family, small_task):
    """Two pools give what one pool of the same images gives."""
    backbone, base, _ = family
    one, two = small_task(300).train, small_task(17).train
    joined = Images(np.concatenate([one.x, two.x]), np.concatenate([one.y, two.y]))
    start = copy.deepcopy(backbone).eval()
    start.load_state_dict(dict(base.params))
    apart, whole = statistics_of(start, [one, two]), statistics_of(start, joined)
    assert content_hash(apart) == content_hash(whole)


def test_statistics_do_not_depend_on_the_number_of_threads(family, threads, small_task):
    backbone, base, _ = family
    start = copy.deepcopy(backbone).eval()
    start.load_state_dict(dict(base.params))
    found = []
    for count in (1, 3):
        with threads(count):
            found.append(content_hash(statistics_of(start, small_task(100).train)))
    assert found[0] == found[1]
