import pytest

from mergekit_lit.callbacks import BaseScore
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.stages.train import train_expert


def card_of(suite, out, *, base="timm/test_resnet@random:0", steps=2, **options):
    result = train_expert(
        data=TaskDataModule(suite, "dots", batch=12, reserve=8, n=90),
        model=ExpertModule(
            base, image_size=8, **{"schedule": "constant", "warmup_steps": 0, **options}
        ),
        steps=[steps],
        out=out,
        trainer={"accelerator": "cpu", "devices": 1},
        checkpoint_every=0,
    )
    return load_expert(result.experts[0]).card


@pytest.mark.parametrize("base", ["timm/test_resnet@random:0", "vit@random:0"])
def test_an_expert_that_did_not_move_is_the_base(tiny_suite, tmp_path, base):
    still = card_of(tiny_suite, tmp_path / "still", base=base, lr=1e-30, head="frozen-ncm")
    assert still.base_val_loss == pytest.approx(still.val_loss, rel=1e-5)
    assert still.base_val_accuracy == still.val_accuracy


def test_the_score_is_that_of_the_base_whatever_is_learned(tiny_suite, tmp_path):
    still = card_of(tiny_suite, tmp_path / "still", lr=1e-30, head="frozen-ncm")
    moved = card_of(tiny_suite, tmp_path / "moved", lr=0.1, head="frozen-ncm")
    assert moved.base_val_loss == still.base_val_loss
    assert moved.val_loss != moved.base_val_loss


def test_a_trained_head_knows_nothing_at_the_start(tiny_suite, tmp_path):
    card = card_of(tiny_suite, tmp_path, lr=0.1, head="trained")
    assert card.base_val_loss is None
    assert card.base_val_accuracy is None


def test_a_run_that_goes_on_keeps_the_score():
    first, second = BaseScore(), BaseScore()
    first.load_state_dict({"loss": 1.5, "accuracy": 0.25})
    second.load_state_dict(first.state_dict())
    assert second.card_facts() == {"base_val_loss": 1.5, "base_val_accuracy": 0.25}
