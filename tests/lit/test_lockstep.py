"""Trainings in lockstep: the files of separate ones, failures kept apart, the faster way found."""

import os
import signal
import threading
from functools import partial

import pytest
import torch
from torch.nn.functional import dropout

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.lit import lockstep
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.heads import Head
from mergekit_lit.lit.lockstep import Pace, in_lockstep
from mergekit_lit.stages.train import train_expert

RESNET, VIT = "timm/test_resnet@random:0", "vit@random:0"
OWN = (
    {"lr": 1e-3, "seed": 0, "data": {"n": 40}},
    {"lr": 2e-3, "seed": 1, "weight_decay": 0.1, "momentum": 0.5, "data": {"n": 44}},
)


def training(
    suite, out, together, *, base, data=None, steps=(2, 4), trainer=None, resume=False, **own
):
    """Train one expert."""
    module = ExpertModule(base, image_size=8, **{"schedule": "constant", "warmup_steps": 1, **own})
    module.together = together
    task = TaskDataModule(suite, "dots", **{"batch": 8, "reserve": 8, **(data or {})})
    settings = {"accelerator": "cpu", "log_every_n_steps": 1, **(trainer or {})}
    train_expert(data=task, model=module, steps=steps, out=out, trainer=settings, resume=resume)


def crew(suite, out, *, each, **common):
    return [partial(training, suite, out / str(i), **common, **own) for i, own in enumerate(each)]


def apart(one, other):
    """Return the largest difference of two lots of tensors, as a share of the largest entry."""
    sizes = [float(tensor.double().abs().max()) or 1.0 for tensor in one.values()]
    gaps = [float((one[name].double() - other[name].double()).abs().max()) for name in one]
    return max(gap / size for gap, size in zip(gaps, sizes, strict=True))


def both(suite, folder, **common):
    """Train in lockstep and separately, and yield the experts of both, file by file."""
    runs = crew(suite, folder / "one", **common)
    assert in_lockstep(runs, Pace(together=True)) == [None] * len(runs)
    for run in crew(suite, folder / "each", **common):
        run(None)
    files = [path.relative_to(folder / "each") for path in folder.glob("each/**/*.safetensors")]
    assert files
    for file in files:
        yield load_expert(folder / "each" / file), load_expert(folder / "one" / file)
    logs = [set(folder.glob(f"{way}/**/metrics.jsonl")) for way in ("one", "each")]
    assert len(logs[0]) == len(logs[1]) == len(runs)


def same_card(card, other):
    """Compare two cards, numbers nearly."""
    card, other = card.to_json(), other.to_json()
    near = {name for name, value in card.items() if isinstance(value, float)}
    assert {name: card[name] for name in card.keys() - near} == {
        name: other[name] for name in other.keys() - near
    }
    assert {name: other[name] for name in near} == pytest.approx(
        {name: card[name] for name in near}, rel=1e-3
    )


@pytest.mark.parametrize(
    ("base", "more"),
    [
        (RESNET, {"trainer": {"gradient_clip_val": 0.5}, "steps": (2,)}),
        pytest.param(
            VIT,
            {"trainer": {"accumulate_grad_batches": 2}, "head": "trained"},
            marks=pytest.mark.slow,
        ),
        pytest.param(RESNET, {"norm_statistics": "frozen"}, marks=pytest.mark.slow),
    ],
)
def test_leaves_what_separate_runs_leave(base, more, tiny_suite, tmp_path):
    for alone, found in both(tiny_suite, tmp_path, each=OWN, base=base, **more):
        assert apart(alone.backbone, found.backbone) < 1e-5
        assert apart(alone.head, found.head) < 1e-5
        same_card(alone.card, found.card)


@pytest.mark.slow
def test_adaptive_steps_agree_where_there_is_a_gradient(tiny_suite, tmp_path):
    each = [{"lr": 1e-3}, {"lr": 5e-4, "weight_decay": 0.1}]
    for alone, found in both(tiny_suite, tmp_path, each=each, base=VIT, optimizer="adamw"):
        gaps = torch.cat(
            [(alone.backbone[k] - found.backbone[k]).abs().flatten() for k in alone.backbone]
        )
        # Where the gradient is 0 but for rounding, such as of the keys' biases, each step is +-lr.
        assert (gaps < 1e-5).float().mean() > 0.97
        assert gaps.max() <= 2 * alone.card.lr * alone.card.steps
        same_card(alone.card, found.card)


@pytest.mark.slow
def test_alone_gives_the_bytes_of_separate_runs(tiny_suite, tmp_path):
    runs = crew(tiny_suite, tmp_path / "one", each=OWN, base=VIT)
    assert in_lockstep(runs, Pace(together=False)) == [None, None]
    for run in crew(tiny_suite, tmp_path / "each", each=OWN, base=VIT):
        run(None)
    for file in (tmp_path / "each").rglob("*.safetensors"):
        other = tmp_path / "one" / file.relative_to(tmp_path / "each")
        assert file.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_one_that_fails_leaves_the_others_alone(tiny_suite, tmp_path):
    each = [{"lr": 1e-3}, {"lr": 1e30}, {"lr": 1e-3, "seed": 1}]
    runs = crew(tiny_suite, tmp_path, each=each, base=VIT)
    first, failed, last = in_lockstep(runs, Pace(together=True))
    assert first is None
    assert last is None
    assert "must be finite" in str(failed)
    assert len(list(tmp_path.rglob("*.record.json"))) == 2


def test_dropout_is_trained_alone(tiny_suite, tmp_path, monkeypatch):
    plain = Head.forward
    monkeypatch.setattr(
        Head, "forward", lambda self, x: dropout(plain(self, x), 0.5, training=self.training)
    )
    pace = Pace(together=True)
    runs = crew(tiny_suite, tmp_path, each=OWN, base=VIT, steps=(2,))
    assert in_lockstep(runs, pace) == [None, None]
    assert pace.together is False
    assert "random" in pace.refusal


def test_the_faster_way_is_measured_in_turns(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(Pace, "_clock", lambda _: now[0])
    pace, made = Pace(), []
    while pace.together is None:
        together = pace.begin()
        made.append(together)
        now[0] += 1.0 if together else 3.0
        pace.end(together=together)
    assert pace.together is True
    assert made == [False, True] * 6
    assert pace.alone_s == [3.0] * 5


@pytest.mark.slow
def test_measuring_happens_in_the_steps_of_the_trainings(tiny_suite, tmp_path):
    pace = Pace()
    runs = crew(tiny_suite, tmp_path, each=OWN, base=VIT, steps=(24,))
    assert in_lockstep(runs, pace) == [None, None]
    assert pace.together is not None
    assert len(pace.alone_s) == len(pace.together_s) == 5


def test_members_leave_with_their_leader(monkeypatch):
    ended = []

    def endless(together):
        try:
            while True:
                together(None, None, None)
        finally:
            ended.append(threading.current_thread())

    rounds = iter([dict.fromkeys, dict.fromkeys])
    monkeypatch.setattr(lockstep, "_is_step", lambda _: False)
    monkeypatch.setattr(lockstep, "_answers", lambda asked, _: next(rounds)(asked))
    with pytest.raises(StopIteration):
        in_lockstep([endless, endless], Pace(together=True))
    assert len(ended) == 2
    assert not any(thread.is_alive() for thread in ended)


@pytest.mark.slow
def test_all_keep_what_they_have_when_told_to_end(tiny_suite, tmp_path, monkeypatch):
    told = []

    def losses(calls):
        told.append(calls)
        if len(told) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return stacked(calls)

    stacked = lockstep._losses
    monkeypatch.setattr(lockstep, "_losses", losses)
    runs = crew(tiny_suite, tmp_path, each=OWN, base=VIT, steps=(9,), resume=True)
    with pytest.raises(SystemExit, match="143"):
        in_lockstep(runs, Pace(together=True))
    assert len(list(tmp_path.rglob("last.ckpt"))) == 2
    assert in_lockstep(runs, Pace(together=True)) == [None, None]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_a_member_that_is_told_to_leave_ends_all():
    def left(_):
        raise SystemExit(143)

    with pytest.raises(SystemExit, match="143"):
        in_lockstep([left, lambda _: None], Pace())


def test_threads_compute_as_their_process_does():
    found = []
    in_lockstep([lambda _: found.append(torch.get_num_threads())], Pace())
    assert found == [torch.get_num_threads()]
