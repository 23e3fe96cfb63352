"""Checkpoints: two generations, every bit checked, between two steps, and none half-written."""

import os
import random
import resource
import shutil
import signal

import pytest
import torch
from lightning.pytorch import Callback

from mergekit_lit.callbacks.last_checkpoint import LastCheckpoint
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.stages.train import train_expert


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.act()


class StopError(Exception):
    pass


def stop():
    raise StopError


def train(suite, out, *, lr=0.01, every=2, steps=(8,), **options):
    return train_expert(
        data=TaskDataModule(suite, "dots", batch=12, reserve=8),
        model=ExpertModule(
            "vit@random:0", image_size=8, lr=lr, schedule="constant", warmup_steps=1
        ),
        steps=steps,
        out=out,
        trainer={"accelerator": "cpu", "log_every_n_steps": 1},
        checkpoint_every=every,
        **options,
    )


def logs(out):
    return [(out / "logs/dots" / f"metrics.{kind}").read_text() for kind in ("jsonl", "csv")]


def names(out):
    return sorted(path.name for path in (out / "checkpoints/dots").iterdir())


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def runs(tiny_suite, tmp_path_factory):
    """A run that came to its end, and one that has checkpoints after steps 4 and 6."""
    folder = tmp_path_factory.mktemp("runs")
    train(tiny_suite, folder / "whole")
    with pytest.raises(StopError):
        train(tiny_suite, folder / "stopped", callbacks=[At(7, stop)])
    return folder


@pytest.fixture
def stopped(runs, tmp_path):
    """The run that was stopped, to go on with."""
    return shutil.copytree(runs / "stopped", tmp_path / "cut")


@pytest.fixture
def whole(runs):
    """The expert of the run that came to its end."""
    return runs / "whole" / "dots.safetensors"


def test_the_last_two_are_kept_and_go_with_the_run(tiny_suite, stopped, whole):
    folder = stopped / "checkpoints/dots"
    assert names(stopped) == ["last.ckpt", "previous.ckpt"]
    assert [step_of(folder / name) for name in names(stopped)] == [6, 4]
    result = train(tiny_suite, stopped, resume=True)
    assert result.experts[0].read_bytes() == whole.read_bytes()
    assert logs(stopped) == logs(whole.parent)
    assert not folder.parent.exists()


def test_a_run_goes_on_to_steps_that_are_asked_for_later(tiny_suite, stopped, whole, caplog):
    first, last = train(tiny_suite, stopped, steps=[7, 8], resume=True).experts
    assert not caplog.messages
    assert load_expert(first).card.steps == 7
    assert params_of(last) == params_of(whole)


def test_a_run_past_a_step_that_is_asked_for_now_begins_anew(tiny_suite, stopped, whole, caplog):
    first, last = train(tiny_suite, stopped, steps=[3, 8], resume=True).experts
    (told,) = caplog.messages
    assert told.count("is past step 3, which is asked for now.") == 2
    assert load_expert(first).card.steps == 3
    assert params_of(last) == params_of(whole)


def params_of(path):
    return {name: tensor.tolist() for name, tensor in load_expert(path).backbone.items()}


def cut_short(content):
    return content[: len(content) // 2]


def flipped(content):
    """Another bit in the middle of some tensor."""
    at = content.index(b"PK\x01\x02") // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [cut_short, flipped])
def test_a_damaged_one_falls_back_to_the_one_before(
    damage, tiny_suite, stopped, whole, caplog, monkeypatch
):
    last = stopped / "checkpoints/dots/last.ckpt"
    last.write_bytes(damage(last.read_bytes()))
    monkeypatch.setattr(LastCheckpoint, "remove", lambda _: None)
    result = train(tiny_suite, stopped, resume=True)
    (told,) = caplog.messages
    assert told.startswith(f"{str(last)!r} is damaged, or no checkpoint of this run: ")
    assert told.endswith("The run goes on at step 4.")
    assert "\n" not in told
    assert result.experts[0].read_bytes() == whole.read_bytes()
    assert logs(stopped) == logs(whole.parent)
    # The damaged one has not taken the place of the whole one.
    assert names(stopped) == ["last.ckpt", "last.ckpt.damaged", "previous.ckpt"]
    assert [step_of(last.with_stem(stem)) for stem in ("last", "previous")] == [6, 4]


def test_with_both_damaged_the_run_begins_anew(tiny_suite, stopped, whole, caplog):
    for name in names(stopped):
        path = stopped / "checkpoints/dots" / name
        path.write_bytes(cut_short(path.read_bytes()))
    result = train(tiny_suite, stopped, resume=True)
    (told,) = caplog.messages
    assert told.count("is damaged") == 2
    assert told.endswith("The run begins anew, since no checkpoint serves it.")
    assert result.experts[0].read_bytes() == whole.read_bytes()
    assert logs(stopped) == logs(whole.parent)
    assert not (stopped / "checkpoints").exists()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_flipped_bit_is_noticed_wherever_it_matters(tmp_path):
    config = {"a": 1}
    last = LastCheckpoint(tmp_path / "last.ckpt", config=config)
    saved = {
        "global_step": 3,
        "callbacks": {"LastCheckpoint": {"config": config, "at": []}},
        "state_dict": {"weight": torch.randn(40, generator=torch.Generator().manual_seed(0))},
    }
    torch.save(saved, last.path)
    content = last.path.read_bytes()
    draw, noticed = random.Random(0), 0
    for _ in range(300):
        at = draw.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        last.path.write_bytes(damaged)
        if last.find(tells=False) is None:
            noticed += 1
        else:
            # Between the parts of the file, where nobody reads.
            assert same(torch.load(last.path, weights_only=True), saved)
    assert noticed > 100


def test_another_configuration_is_refused_and_nothing_lost(tiny_suite, stopped):
    with pytest.raises(ValueError, match=r"`model\.lr` was 0\.01 and is 0\.02 now"):
        train(tiny_suite, stopped, lr=0.02, resume=True)
    assert names(stopped) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_signal_ends_the_run_with_the_step(step, tiny_suite, tmp_path, whole):
    act = At(step, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(SystemExit) as caught:
        train(tiny_suite, tmp_path / "cut", callbacks=[act])
    assert caught.value.code == 75
    folder = tmp_path / "cut/checkpoints/dots"
    assert caught.value.__notes__ == [
        "Ended by SIGUSR1.",
        f"Step {step} of 8 is kept in {str(folder)!r}.",
    ]
    assert step_of(folder / "last.ckpt") == step
    result = train(tiny_suite, tmp_path / "cut", resume=True)
    assert result.experts[0].read_bytes() == whole.read_bytes()
    assert logs(tmp_path / "cut") == logs(whole.parent)


def test_a_signal_in_the_last_step_lets_the_run_finish(tiny_suite, tmp_path):
    act = At(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(tiny_suite, tmp_path, callbacks=[act])
    assert (tmp_path / "dots.record.json").is_file()
    assert not (tmp_path / "checkpoints").exists()


def test_without_checkpoints_a_signal_ends_the_run_at_once(tiny_suite, tmp_path):
    act = At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        train(tiny_suite, tmp_path, callbacks=[act], every=0)
    assert caught.value.__notes__ == ["Ended by SIGTERM."]
    assert not (tmp_path / "checkpoints").exists()


def test_a_full_disk_leaves_the_two_before(tiny_suite, tmp_path, whole):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    out = tmp_path / "cut"
    try:
        with pytest.raises(OSError, match=r"Could not write '.*last\.ckpt': .*half-written"):
            train(tiny_suite, out, callbacks=[At(5, fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(out) == ["last.ckpt", "previous.ckpt"]
    assert step_of(out / "checkpoints/dots/last.ckpt") == 4
    assert train(tiny_suite, out, resume=True).experts[0].read_bytes() == whole.read_bytes()


def test_what_a_killed_process_left_is_cleared_away(tiny_suite, stopped):
    left = [
        stopped / "checkpoints/dots/.last.ckpt.ab3_d5f7",
        stopped / ".dots.safetensors.ab3_d5f7",
        stopped / "logs/dots/.metrics.csv.ab3_d5f7",
    ]
    other = stopped / ".stripes.safetensors.ab3_d5f7"
    for path in (*left, other):
        path.write_bytes(b"half")
    train(tiny_suite, stopped, resume=True)
    assert not any(path.exists() for path in left)
    assert other.exists()
