import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import cross_entropy

from mergekit_lit.callbacks import GradientNoise, GradientNorm, PathLength
from mergekit_lit.callbacks.expert_export import ExpertExport
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.files import file_hash
from mergekit_lit.core.params import content_hash
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.passes import inputs
from mergekit_lit.models.backbones import load_base
from mergekit_lit.models.statistics import estimate_statistics

RESNET, VIT = "timm/test_resnet@random:0", "vit@random:0"


class Facts(Callback):
    def card_facts(self):
        return {"path_length": 1.5, "travel": None}


def fit(suite, out, *, base=RESNET, steps=3, callbacks=(), trainer=None, export=None, **options):
    module = ExpertModule(
        base, image_size=8, **{"lr": 0.01, "schedule": "constant", "warmup_steps": 0, **options}
    )
    data = TaskDataModule(suite, "dots", batch=12, reserve=8, n=90)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        fitter = Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[*callbacks, export or ExpertExport(out)],
            **(trainer or {}),
        )
        fitter.fit(module, datamodule=data)
    return module, data.task_data


def test_the_file_holds_what_was_trained(tiny_suite, tmp_path):
    module, _ = fit(tiny_suite, tmp_path, head="trained")
    expert = load_expert(tmp_path / "dots.safetensors")
    assert expert.structure == module.structure
    assert torch.equal(expert.head["weight"], module.head.weight)
    state = module.backbone.state_dict()
    assert set(expert.backbone) == set(state)
    for name, tensor in state.items():
        if expert.structure[name].is_merged:
            assert torch.equal(expert.backbone[name], tensor), name


def test_statistics_are_those_of_the_final_weights_on_the_training_images(tiny_suite, tmp_path):
    module, data = fit(tiny_suite, tmp_path)
    expert = load_expert(tmp_path / "dots.safetensors")
    plain, _ = load_base(RESNET, image_size=8)
    plain.load_state_dict(module.backbone.state_dict())
    # One batch of all images: an exact mean, whatever the order.
    expected = estimate_statistics(
        plain, [inputs(plain, torch.from_numpy(np.asarray(data.train.x)))]
    )
    assert expected
    for name, tensor in expected.items():
        torch.testing.assert_close(expert.backbone[name], tensor, rtol=1e-5, atol=1e-6)
    # The running averages of training are something else.
    assert not torch.equal(expert.backbone["bn1.running_mean"], module.backbone.bn1.running_mean)


def test_frozen_statistics_stay(tiny_suite, tmp_path):
    module, _ = fit(tiny_suite, tmp_path, norm_statistics="frozen")
    expert = load_expert(tmp_path / "dots.safetensors")
    for name, tensor in module.backbone.state_dict().items():
        assert torch.equal(expert.backbone[name], tensor), name


@pytest.mark.parametrize("base", [RESNET, VIT])
def test_losses_and_accuracies_are_those_of_the_file(tiny_suite, tmp_path, base):
    _, data = fit(tiny_suite, tmp_path, base=base, label_smoothing=0.3)
    expert = load_expert(tmp_path / "dots.safetensors")
    plain, _ = load_base(base, image_size=8)
    plain.load_state_dict(dict(expert.backbone))
    plain.eval()
    for split in ("train", "val"):
        images = getattr(data, split)
        with torch.no_grad():
            features = plain(inputs(plain, torch.from_numpy(np.asarray(images.x))))
        logits = features @ expert.head["weight"].T + expert.head["bias"]
        y = torch.from_numpy(images.y)
        loss, right = cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()
        assert getattr(expert.card, f"{split}_loss") == pytest.approx(float(loss), rel=1e-5)
        assert getattr(expert.card, f"{split}_accuracy") == pytest.approx(float(right))


def test_the_card_tells_the_run(tiny_suite, tmp_path):
    module, data = fit(
        tiny_suite,
        tmp_path,
        schedule="cosine",
        warmup_steps=1,
        weight_decay=0.1,
        seed=3,
        callbacks=[Facts()],
        trainer={"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    )
    card = load_expert(tmp_path / "dots.safetensors").card.to_json()
    expected = {
        "task": "dots",
        "suite": data.suite,
        "classes": 3,
        "split_hash": data.split_hash,
        "n": 90,
        "base": module.base.name,
        "base_hash": module.base.content,
        "backbone": module.base.backbone,
        "image_size": 8,
        "optimizer": "sgd",
        "lr": 0.01,
        "momentum": 0.9,
        "betas": None,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_steps": 1,
        "schedule_steps": 3,
        "steps": 3,
        "batch": 24,
        "label_smoothing": 0.0,
        "clip_norm": 0.5,
        "precision": "32-true",
        "norm_statistics": "train",
        "head": "frozen-ncm",
        "seed": 3,
        "replaced": 0,
        "neighbour_seed": None,
        "path_length": 1.5,
        "travel": None,
    }
    assert {key: card[key] for key in expected} == expected


def test_the_file_is_the_same_whatever_watches(tiny_suite, tmp_path):
    """To the last bit: weights, head and statistics."""
    watchers = [GradientNorm(), PathLength(), GradientNoise(every=2)]
    for name, callbacks in (("plain", []), ("watched", watchers)):
        fit(tiny_suite, tmp_path / name, callbacks=callbacks, steps=4)
    plain, watched = (load_expert(tmp_path / n / "dots.safetensors") for n in ("plain", "watched"))
    assert content_hash(plain.backbone) == content_hash(watched.backbone)
    assert content_hash(plain.head) == content_hash(watched.head)
    assert watched.card.gradient_noise is not None


def test_exports_at_several_steps_do_not_disturb_the_run(tiny_suite, tmp_path):
    several = ExpertExport(tmp_path / "several", steps=(2, 4))
    fit(tiny_suite, tmp_path, steps=4, export=several)
    for steps in (2, 4):
        alone = ExpertExport(tmp_path / f"alone{steps}")
        fit(tiny_suite, tmp_path, steps=steps, export=alone)
        file = tmp_path / "several" / f"dots-step{steps}.safetensors"
        assert file_hash(file) == file_hash(tmp_path / f"alone{steps}" / "dots.safetensors")


class Spoil(Callback):
    """Sets one weight after the last step, when the loss of every step was fine."""

    def __init__(self, value):
        self.value = value

    def on_train_batch_end(self, _, module, *__):
        with torch.no_grad():
            next(module.backbone.parameters()).fill_(self.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "Expert 'dots' after 1 steps must hold finite numbers, but 'backbone"),
        (float("inf"), "Expert 'dots' after 1 steps must hold finite numbers"),
        (1e38, "The train loss of expert 'dots' after 1 steps must be finite, but is nan"),
    ],
)
def test_an_expert_that_diverged_is_not_written(tiny_suite, tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        fit(tiny_suite, tmp_path, base=VIT, steps=1, callbacks=[Spoil(value)])
    assert not list(tmp_path.iterdir())


def test_watches_expert_modules_alone(tmp_path):
    class Other(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, *_):
            return self.layer(torch.ones(1, 1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExpertExport(tmp_path)],
    )
    with pytest.raises(TypeError, match="ExpertExport must watch an ExpertModule, but got Other"):
        trainer.fit(Other(), [torch.ones(2, 1)])
