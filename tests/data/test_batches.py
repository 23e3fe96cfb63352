"""Loaders: how many batches, in which order, on which rank."""

import itertools

import numpy as np
import pytest
import torch

from mergekit_lit.data.batches import EvalLoader, StepLoader, batch_positions
from mergekit_lit.data.splits import Images


def make_images(n):
    x = np.arange(n * 12, dtype=np.uint32).astype(np.uint8).reshape(n, 2, 2, 3)
    return Images(x, np.arange(n, dtype=np.int64) % 7)


def positions(loader):
    return [batch[2].tolist() for batch in loader]


def test_batches_hold_the_images_and_labels_of_their_positions():
    images = make_images(20)
    for x, y, position in StepLoader(images, batch=6, steps=5):
        assert x.dtype == torch.uint8
        np.testing.assert_array_equal(x, images.x[position])
        np.testing.assert_array_equal(y, images.y[position])


def test_no_image_comes_twice_in_an_epoch_and_epochs_differ():
    batches = positions(StepLoader(make_images(20), batch=6, steps=6))
    epochs = [list(itertools.chain(*batches[:3])), list(itertools.chain(*batches[3:]))]
    assert [len(set(epoch)) for epoch in epochs] == [18, 18]
    assert epochs[0] != epochs[1]


def test_batches_run_across_epochs_where_the_batch_is_larger_than_the_data():
    batches = positions(StepLoader(make_images(5), batch=8, steps=5))
    stream = list(itertools.chain(*batches))
    assert len(stream) == 40
    for epoch in range(8):
        assert sorted(stream[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("n", "batch"), [(20, 6), (20, 20), (5, 8), (3, 7)])
def test_a_resumed_loader_goes_on_where_it_stopped(n, batch):
    whole = positions(StepLoader(make_images(n), batch=batch, steps=9, accumulate=2))
    assert len(whole) == 18
    for start in range(19):
        rest = StepLoader(make_images(n), batch=batch, steps=9, accumulate=2, start=start)
        assert len(rest) == 18 - start
        assert positions(rest) == whole[start:]


def test_ranks_share_each_batch_contiguously():
    images = make_images(20)
    whole = positions(StepLoader(images, batch=6, steps=4))
    ranks = [positions(StepLoader(images, batch=6, steps=4, rank=r, world=3)) for r in range(3)]
    assert [a + b + c for a, b, c in zip(*ranks, strict=True)] == whole


def test_the_order_follows_from_the_seed_alone():
    first, again, other = (
        list(itertools.islice(batch_positions(50, 8, seed), 12)) for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    # The order must never change between versions or machines: experts would not be reproducible.
    assert first[0].tolist() == [20, 16, 40, 28, 4, 29, 32, 38]


@pytest.mark.parametrize(("n", "batch", "world"), [(10, 4, 1), (10, 4, 3), (2, 5, 3), (0, 4, 2)])
def test_evaluation_sees_every_image_once_in_order(n, batch, world):
    loaders = [EvalLoader(make_images(n), batch=batch, rank=r, world=world) for r in range(world)]
    seen = [list(itertools.chain(*positions(loader))) for loader in loaders]
    assert list(itertools.chain(*seen)) == list(range(n))
    assert [len(positions(loader)) for loader in loaders] == [len(loader) for loader in loaders]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "`batch` must be at least 1, but is 0"),
        ({"steps": 0}, "`steps` must be at least 1, but is 0"),
        ({"accumulate": 0}, "`accumulate` must be at least 1, but is 0"),
        ({"start": 11}, r"`start` must lie in 0\.\.10, but is 11"),
        ({"rank": 2, "world": 2}, r"`rank` must lie in 0\.\.1, but is 2"),
        ({"batch": 5, "world": 2}, "`batch` must be a multiple of the 2 processes, but is 5"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StepLoader(make_images(10), **{"batch": 4, "steps": 10, **settings})


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        StepLoader(make_images(0), batch=4, steps=1)
