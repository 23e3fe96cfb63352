from types import SimpleNamespace

import pytest
import torch

from mergekit_lit.callbacks.progress import Progress


def run(callback, steps, *, accumulate=1, rank_zero=True):
    for micro in range(1, steps * accumulate + 1):
        trainer = SimpleNamespace(
            global_step=micro // accumulate, max_steps=steps, is_global_zero=rank_zero
        )
        outputs = {"loss": torch.tensor(float(micro), requires_grad=True)}
        callback.on_train_batch_end(trainer, None, outputs, None, micro - 1)


def test_tells_now_and_then_and_the_last_step():
    told = []
    run(Progress(lambda *message: told.append(message), every=3), 7)
    assert told == [(3, 7, 3.0), (6, 7, 6.0), (7, 7, 7.0)]


def test_accumulated_micro_batches_are_told_once():
    told = []
    run(Progress(lambda step, *_: told.append(step), every=1), 2, accumulate=3)
    assert told == [0, 1, 2]


def test_other_processes_are_silent():
    told = []
    run(Progress(lambda *message: told.append(message), every=1), 2, rank_zero=False)
    assert told == []


def test_refuses_to_tell_never():
    with pytest.raises(ValueError, match="`every` must be at least 1, but is 0"):
        Progress(print, every=0)
