"""Batches of all tasks shared among processes: what they gather is what one would see."""

from types import SimpleNamespace

import pytest

from mergekit_lit.lit.merge import MergeModule
from mergekit_lit.lit.suite_data import BatchShare, MergeDataModule


def test_shares_of_batches_join_to_the_table_of_one_process(family, tiny_suite, scored, merge_data):
    """What two processes would gather, in the order in which they would, is exactly the same."""
    backbone, _, experts = family
    data = merge_data()
    whole = MergeModule(backbone, {"experts": experts})
    scored(whole, data)

    class Shares(MergeDataModule):
        def test_dataloader(self):
            return [_Shares(task.test, self.batch) for task in self.task_data]

    shares = Shares(tiny_suite, batch=7, reserve=4)
    joined = MergeModule(backbone, {"experts": experts})
    scored(joined, shares)
    assert joined.results() == whole.results()


class _Shares:
    """The batches of rank 1 of 2, then those of rank 0."""

    def __init__(self, images, batch):
        self.parts = [BatchShare(images, batch=batch, rank=rank, world=2) for rank in (1, 0)]

    def __len__(self):
        return sum(len(part) for part in self.parts)

    def __iter__(self):
        for part in self.parts:
            yield from part


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 7, 8, 30])
def test_each_image_goes_to_one_process_in_the_batches_of_one(n, world, small_task):
    images = small_task(n).test
    shares = [list(BatchShare(images, batch=7, rank=r, world=world)) for r in range(world)]
    batches = {int(b[2][0]): b[2].tolist() for share in shares for b in share}
    alone = [b[2].tolist() for b in BatchShare(images, batch=7)]
    assert [batches[start] for start in sorted(batches)] == alone
    assert sum(len(share) for share in shares) == len(alone)


@pytest.mark.parametrize(("batch", "shares"), [(64, [[1, 0], [0, 1]]), (20, [[1, 1], [1, 1]])])
def test_processes_take_turns_over_the_batches_of_all_tasks(batch, shares, merge_data):
    for rank, expected in enumerate(shares):
        data = merge_data(batch=batch)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        assert [len(share) for share in data.test_dataloader()] == expected


def test_more_processes_than_batches_are_refused(merge_data):
    data = merge_data(batch=64)
    data.trainer = SimpleNamespace(global_rank=0, world_size=3)
    with pytest.raises(ValueError, match="each of 3 processes a batch, but 64 makes 2 in all"):
        data.test_dataloader()
