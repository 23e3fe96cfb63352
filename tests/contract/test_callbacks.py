"""What every callback of ours keeps: it trains along, resumes exactly and disturbs nothing."""

from pathlib import Path

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mergekit_lit.callbacks
from mergekit_lit.callbacks import (
    BoundTerms,
    DeltaGeometry,
    GradientNoise,
    GradientNorm,
    LastCheckpoint,
    MergeCallback,
    PathLength,
    Progress,
)

# How each is made; beside those that it reads.
CALLBACKS = {
    "BoundTerms": lambda _: [PathLength(), GradientNoise(every=2), BoundTerms(smoothness=0.1)],
    "DeltaGeometry": lambda _: [DeltaGeometry()],
    "GradientNoise": lambda _: [GradientNoise(every=2)],
    "GradientNorm": lambda _: [GradientNorm(per_parameter=True)],
    "LastCheckpoint": lambda folder: [LastCheckpoint(folder / "last.ckpt", every=2)],
    "MergeCallback": lambda _: [MergeCallback()],
    "PathLength": lambda _: [PathLength(), GradientNoise(every=2)],
    "Progress": lambda _: [Progress(lambda *_: None)],
}
# These watch an ExpertModule alone; tests/callbacks/ holds their own contracts.
SPECIAL = {"BaseScore", "ExpertExport", "StabilityTwins"}


class AnyModule(LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5), nn.ReLU())
        self.out = nn.Linear(5, 3)
        draw = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.out(self.net(x)), y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def train(callbacks, *, steps, resume=None):
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(8, 3, 8, 8, generator=draw), torch.arange(8) % 3)
    trainer = Trainer(
        callbacks=callbacks,
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        gradient_clip_val=0.5,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = AnyModule()
    # One batch an epoch, so that a run may stop after any step.
    trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=resume)
    return trainer, module


def equal(left, right):
    """Return whether nested states are the same to the last bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def test_every_callback_is_under_contract():
    assert sorted(mergekit_lit.callbacks.__all__) == mergekit_lit.callbacks.__all__
    assert {*CALLBACKS, *SPECIAL} == set(mergekit_lit.callbacks.__all__)
    for name in mergekit_lit.callbacks.__all__:
        assert issubclass(getattr(mergekit_lit.callbacks, name), Callback)


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_training_is_not_disturbed(name, tmp_path):
    _, plain = train([], steps=4)
    _, watched = train(CALLBACKS[name](tmp_path), steps=4)
    assert equal(dict(plain.state_dict()), dict(watched.state_dict()))
    assert watched.training


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_resumed_run_ends_as_one_that_did_not_stop(name, tmp_path):
    whole = CALLBACKS[name](tmp_path)
    train(whole, steps=7)
    first, _ = train(CALLBACKS[name](tmp_path), steps=3)
    checkpoint = tmp_path / "stopped.ckpt"
    first.save_checkpoint(checkpoint)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3
    resumed = CALLBACKS[name](tmp_path)
    train(resumed, steps=7, resume=checkpoint)
    for left, right in zip(whole, resumed, strict=True):
        assert equal(left.state_dict(), right.state_dict())
        if hasattr(left, "card_facts"):
            assert left.card_facts() == right.card_facts()
            assert any(value is not None for value in left.card_facts().values())


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_state_survives_a_round_trip(name, tmp_path):
    callbacks = CALLBACKS[name](tmp_path)
    train(callbacks, steps=3)
    for old, new in zip(callbacks, CALLBACKS[name](tmp_path), strict=True):
        new.load_state_dict(old.state_dict())
        assert equal(old.state_dict(), new.state_dict())


def test_one_that_joins_late_tells_the_card_nothing(tmp_path):
    """Facts of a whole run cannot be told by who has seen the end of it."""
    first, _ = train([], steps=3)
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    late = [GradientNorm(), GradientNoise(every=2), PathLength()]
    train(late, steps=6, resume=tmp_path / "stopped.ckpt")
    for callback in late:
        assert set(callback.card_facts().values()) == {None}


def test_a_second_fit_starts_anew():
    callbacks = [GradientNorm(), GradientNoise(every=2), PathLength()]
    train(callbacks, steps=5)
    train(callbacks, steps=3)
    fresh = [GradientNorm(), GradientNoise(every=2), PathLength()]
    train(fresh, steps=3)
    assert [c.card_facts() for c in callbacks] == [c.card_facts() for c in fresh]


def test_card_facts_are_fields_of_the_card():
    from mergekit_lit.core.cards import Card

    facts = {}
    for callback in (GradientNorm(), GradientNoise(), PathLength()):
        assert not facts.keys() & callback.card_facts().keys()
        facts |= callback.card_facts()
    Card(**facts)


def test_a_callback_is_added_by_class_path(tmp_path: Path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--callbacks", type=list[Callback])
    config = tmp_path / "run.yaml"
    config.write_text(
        "callbacks:\n"
        "- class_path: mergekit_lit.callbacks.GradientNorm\n"
        "  init_args: {per_parameter: true}\n"
        "- class_path: mergekit_lit.callbacks.GradientNoise\n"
        "  init_args: {every: 10}\n"
    )
    arguments = [f"--config={config}", "--callbacks+=mergekit_lit.callbacks.PathLength"]
    found = parser.instantiate(parser.parse_args(arguments)).callbacks
    assert [type(c) for c in found] == [GradientNorm, GradientNoise, PathLength]
    assert found[0].per_parameter
    assert found[1].every == 10
