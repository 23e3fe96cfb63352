"""Experts that learn another's answers: the loss against NumPy, and real tiny runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from mergekit_lit.core.expert_files import load_expert, save_expert
from mergekit_lit.core.files import file_hash
from mergekit_lit.core.params import content_hash, with_prefix
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.distillation import Distillation
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.passes import inputs
from mergekit_lit.models.backbones import load_base
from mergekit_lit.models.heads import apply_head
from mergekit_lit.stages.train import train_expert

RESNET, VIT = "resnet@random:0", "vit@random:0"


def train(suite, out, *, base=VIT, task="dots", steps=(4,), callbacks=(), model=None, **options):
    # A head that is fitted at the base already solves a task as small as these.
    given = {"image_size": 8, "lr": 0.01, "schedule": "constant", "warmup_steps": 1}
    given["head"] = "trained"
    return train_expert(
        data=TaskDataModule(suite, task, batch=12, reserve=8),
        model=ExpertModule(base, **{**given, **(model or {})}),
        steps=list(steps),
        out=out,
        trainer={"accelerator": "cpu"},
        callbacks=callbacks,
        **options,
    ).experts[-1]


@pytest.fixture(scope="module")
def teacher(tiny_suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    return train(tiny_suite, out, steps=[40], model={"optimizer": "adamw", "lr": 3e-3})


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_the_loss_is_the_papers(teacher):
    backbone, base = load_base(VIT, image_size=8)
    made = Distillation.of(str(teacher), base, share=0.7, temperature=3.0)
    taught = made.taught(backbone.eval())
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8, generator=draw)
    logits, y = torch.randn(5, 3, generator=draw), torch.tensor([0, 1, 2, 1, 0])
    found = taught.loss(x, logits, cross_entropy(logits, y))
    images = (x.permute(0, 3, 1, 2).float() / 255 - torch.tensor(backbone.mean)[:, None, None]) / (
        torch.tensor(backbone.std)[:, None, None]
    )
    with torch.no_grad():
        theirs = apply_head(load_expert(teacher).head, backbone(images)).double().numpy()
    ours = logits.double().numpy()
    p, q = softmax(theirs / 3), softmax(ours / 3)
    apart = (p * (np.log(p) - np.log(q))).sum(1).mean()
    plain = -np.log(softmax(ours))[np.arange(5), y.numpy()].mean()
    assert float(found) == pytest.approx(0.3 * plain + 0.7 * 9 * apart, rel=1e-5)


def test_a_student_comes_to_answer_as_its_teacher_does(tiny_suite, tmp_path, teacher):
    model = {"teacher": str(teacher), "teacher_share": 1.0, "lr": 0.03}
    student = load_expert(train(tiny_suite, tmp_path, steps=[60], model=model))
    backbone, base = load_base(VIT, image_size=8)
    start = load_expert(train(tiny_suite, tmp_path / "start", steps=[2], model={"lr": 1e-30}))
    data = TaskDataModule(tiny_suite, "dots", batch=12, reserve=8)
    data.setup("fit")
    made = Distillation.of(str(teacher), base, share=1.0, temperature=1.0).taught(backbone.eval())
    x = torch.from_numpy(data.task_data.train.x[:])
    apart = {}
    for name, params, head in (
        ("base", base.params, start.head),
        ("student", student.backbone, student.head),
    ):
        network, _ = load_base(VIT, image_size=8)
        network.load_state_dict(dict(params))
        with torch.no_grad():
            logits = apply_head(head, network.eval()(inputs(network, x)))
            apart[name] = float(made.loss(x, logits, torch.tensor(0.0)))
    assert apart["student"] < 0.3 * apart["base"]


def test_what_already_answers_so_stays_where_it_is(tiny_suite, tmp_path):
    still = train(tiny_suite, tmp_path / "still", steps=[2], model={"lr": 1e-30})
    model = {"teacher": str(still), "teacher_share": 1.0, "lr": 0.1}
    student = load_expert(train(tiny_suite, tmp_path, steps=[6], model=model))
    assert student.card.displacement < 1e-3
    moved = load_expert(train(tiny_suite, tmp_path / "moved", steps=[6], model={"lr": 0.1}))
    assert moved.card.displacement > 100 * student.card.displacement


def test_the_card_names_the_teacher(tiny_suite, tmp_path, teacher):
    card = load_expert(train(tiny_suite, tmp_path, model={"teacher": str(teacher)})).card
    theirs = load_expert(teacher)
    tensors = with_prefix(theirs.backbone, "backbone.") | with_prefix(theirs.head, "head.")
    assert card.teacher == content_hash(tensors)
    assert (card.teacher_share, card.temperature) == (0.9, 2.0)
    plain = load_expert(teacher).card
    assert (plain.teacher, plain.teacher_share, plain.temperature) == (None, None, None)


def test_an_interrupted_student_goes_on_to_the_same_bytes(
    tiny_suite, tmp_path, teacher, stop_after
):
    options = {"steps": [6], "model": {"teacher": str(teacher)}}
    whole = train(tiny_suite, tmp_path / "whole", **options)
    cut = {"checkpoint_every": 2, "callbacks": [stop_after(5)]}
    with pytest.raises(stop_after.error):
        train(tiny_suite, tmp_path / "cut", **cut, **options)
    gone_on = train(tiny_suite, tmp_path / "cut", checkpoint_every=2, resume=True, **options)
    assert file_hash(gone_on) == file_hash(whole)


def test_another_teacher_under_the_same_name_is_another_run(tiny_suite, tmp_path, teacher):
    other = train(tiny_suite, tmp_path / "other", steps=[2])
    named, hashes = tmp_path / "teacher.safetensors", set()
    turned = load_expert(teacher)
    save_expert(
        tmp_path / "turned.safetensors",
        replace(turned, head={name: -tensor for name, tensor in turned.head.items()}),
    )
    for file in (other, teacher, tmp_path / "turned.safetensors"):
        named.write_bytes(file.read_bytes())
        student = train(tiny_suite, tmp_path / "s", resume=True, model={"teacher": str(named)})
        hashes.add(file_hash(student))
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "stripes"}, ValueError, "`teacher` must be an expert of 'stripes'.* of 'dots'"),
        ({"base": RESNET}, ValueError, r"`teacher` must be a 'resnet' .* is of 'vit'"),
        ({"model": {"teacher": "none.safetensors"}}, FileNotFoundError, "none.safetensors"),
        ({"model": {"teacher_share": 0.0}}, ValueError, r"`teacher_share` must lie in \(0, 1\]"),
        ({"model": {"temperature": 0.0}}, ValueError, "`temperature` must be positive"),
    ],
)
def test_bad_teachers_are_told_in_one_line(tiny_suite, tmp_path, teacher, options, error, message):
    model = {"teacher": str(teacher), **options.pop("model", {})}
    with pytest.raises(error, match=message) as caught:
        train(tiny_suite, tmp_path, model=model, **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_share_of_no_teacher_is_looked_at_too():
    with pytest.raises(ValueError, match="`teacher_share` must lie in"):
        ExpertModule(VIT, image_size=8, teacher_share=7.0)
