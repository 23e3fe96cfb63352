"""Twins: the callback's distances are those of ordinary runs on neighbouring data sets."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from mergekit_lit.callbacks import ExpertExport, StabilityTwins
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.files import file_hash
from mergekit_lit.core.measurements import add_measurements, read_measurements
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.stages.train import train_expert

RESNET, VIT = "timm/test_resnet@random:0", "vit@random:0"


class Trajectory(Callback):
    """Keeps the weights after every step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.weights):
            tuned = pl_module.tuned()
            kinds = {name: info.kind for name, info in pl_module.structure.items()}
            moved = [t for n, t in tuned.items() if kinds[n] not in ("statistic", "counter")]
            self.weights.append(torch.cat([t.flatten() for t in moved]).clone())


def train(suite, out, *callbacks, base=VIT, steps=(6,), data=None, model=None, **options):
    module = ExpertModule(
        base, image_size=8, **{"lr": 0.01, "schedule": "cosine", "warmup_steps": 2, **(model or {})}
    )
    return train_expert(
        data=TaskDataModule(suite, "dots", **{"batch": 8, "reserve": 8, **(data or {})}),
        model=module,
        steps=list(steps),
        out=out,
        callbacks=callbacks,
        **{"trainer": {"accelerator": "cpu"}, **options},
    )


def logged(out, name):
    """The values of one metric over the steps."""
    rows = (out / "logs/dots/metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, rows) if name in row]


SETTINGS = {
    "momentum and a schedule": {"base": RESNET},
    "Adam and augmentation": {
        "model": {"optimizer": "adamw"},
        "data": {"augment": "crop-flip"},
    },
    "clipping and accumulation": {
        "trainer": {
            "accelerator": "cpu",
            "gradient_clip_val": 0.5,
            "accumulate_grad_batches": 2,
        }
    },
    "a trained head": {"base": RESNET, "model": {"head": "trained"}},
    "sharpness-aware": {"model": {"sam_radius": 0.05}},
    "low-rank": {"model": {"finetuning": "lora", "lora_rank": 2}},
    "linearised": {"model": {"finetuning": "linearised"}},
    "bf16": {"trainer": {"accelerator": "cpu", "precision": "bf16-mixed"}},
}


FAST = "momentum and a schedule"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(chosen, id=name, marks=[] if name == FAST else [pytest.mark.slow])
        for name, chosen in SETTINGS.items()
    ],
)
def test_distances_are_those_of_ordinary_runs(tiny_suite, tmp_path, settings):
    paths = {}
    for name, data in (("plain", {}), ("other", {"neighbour": 4, "neighbour_seed": 1})):
        paths[name] = Trajectory()
        given = {**settings, "data": {**settings.get("data", {}), **data}}
        train(tiny_suite, tmp_path / name, paths[name], **given)
    pairs = zip(paths["plain"].weights, paths["other"].weights, strict=True)
    expected = [float((a.double() - b.double()).square().sum()) for a, b in pairs]
    assert expected[-1] > 0
    twins = StabilityTwins(twins=2, replaced=[4], export=True)
    own = Trajectory()
    result = train(tiny_suite, tmp_path / "twins", own, twins, **settings)
    # The run itself is what it is without twins.
    assert all(torch.equal(a, b) for a, b in zip(own.weights, paths["plain"].weights, strict=True))
    measured = read_measurements(result.experts[0])["stability"]
    assert measured["null"] == 0
    assert measured["replaced"]["4"]["each"][1] * 4 == pytest.approx(expected[-1], rel=1e-5)
    exported = load_expert(tmp_path / "twins/dots.twins/m4-1.safetensors")
    ordinary = load_expert(tmp_path / "other/dots.safetensors")
    assert all(torch.equal(exported.backbone[n], t) for n, t in ordinary.backbone.items())
    assert all(torch.equal(exported.head[n], t) for n, t in ordinary.head.items())
    assert exported.card == replace(
        ordinary.card,
        **dict.fromkeys(
            [
                "travel",
                "travel_squared",
                "path_length",
                "displacement",
                "mean_squared_displacement",
                "gradient_noise",
                "noise_estimates",
                "eps_path",
                "gradient_norm",
                "base_val_loss",
                "base_val_accuracy",
            ]
        ),
        twin_of=file_hash(result.experts[0]),
    )


def test_an_expert_that_is_written_anew_keeps_no_twins_of_the_one_before(tiny_suite, tmp_path):
    kept = tmp_path / "dots.twins"
    train(tiny_suite, tmp_path, StabilityTwins(twins=2, null=False, export=True))
    (kept / "notes.txt").write_text("mine")
    assert len(list(kept.glob("*.safetensors"))) == 2
    settings = {"model": {"lr": 0.02}}
    fewer = StabilityTwins(twins=1, null=False, export=True)
    result = train(tiny_suite, tmp_path, fewer, **settings)
    (twin,) = kept.glob("*.safetensors")
    assert load_expert(twin).card.twin_of == file_hash(result.experts[0])
    train(tiny_suite, tmp_path, **settings)
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]
    # Of several step counts each expert has its own.
    several = {"steps": (2, 3), "model": {"schedule": "constant"}}
    result = train(tiny_suite, tmp_path / "k", StabilityTwins(twins=1, export=True), **several)
    for path in result.experts:
        twin = load_expert(path.with_suffix(".twins") / "m1-0.safetensors")
        assert twin.card.twin_of == file_hash(path)
        assert twin.card.steps == load_expert(path).card.steps


def test_twins_that_would_step_after_the_export_are_refused(tiny_suite, tmp_path):
    with pytest.raises(ValueError, match="must stand before ExpertExport"):
        train(tiny_suite, tmp_path, ExpertExport(tmp_path / "own"), StabilityTwins(export=True))


def test_every_step_is_logged_and_zero_until_a_replaced_sample_is_met(tiny_suite, tmp_path):
    twins = StabilityTwins(twins=1, replaced=[1])
    result = train(tiny_suite, tmp_path, twins, steps=[12])
    measured = read_measurements(result.experts[0])["stability"]
    met = measured["first_met"]["m1/0"]
    assert 1 < met <= 12  # 112 samples in 14 batches: the seed is one that meets it late enough
    distances = logged(tmp_path, "stability/m1/mean")
    assert len(distances) == 12
    assert distances[: met - 1] == [0.0] * (met - 1)
    assert all(distance > 0 for distance in distances[met - 1 :])
    assert set(logged(tmp_path, "stability/null")) == {0.0}
    assert 0 < max(logged(tmp_path, "stability/rounding")) < 1e-6
    groups = [
        name
        for name in json.loads((tmp_path / "logs/dots/metrics.jsonl").read_text().splitlines()[-1])
        if "/group/" in name
    ]
    total = sum(logged(tmp_path, name)[-1] for name in groups)
    assert total == pytest.approx(distances[-1], rel=1e-6)


def test_a_null_twin_s_buffers_are_the_run_s(tiny_suite, tmp_path):
    class Same(Callback):
        seen = 0

        def on_train_batch_end(self, trainer, pl_module, *_):
            null = twins._twins[-1].module.state_dict()
            assert all(torch.equal(null[n], t) for n, t in pl_module.state_dict().items())
            self.seen += 1

    twins, same = StabilityTwins(twins=1, rounding=False), Same()
    train(tiny_suite, tmp_path, twins, same, base=RESNET)
    assert same.seen == 6


@pytest.mark.slow
def test_a_resumed_run_has_the_same_twins(tiny_suite, tmp_path):
    class StopError(Exception):
        pass

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise StopError

    def run(out, *callbacks, **options):
        twins = StabilityTwins(twins=2, replaced=[1, 4])
        settings = {"base": RESNET, "steps": [3, 8], "model": {"schedule": "constant"}}
        return train(tiny_suite, out, twins, *callbacks, checkpoint_every=2, **settings, **options)

    whole = run(tmp_path / "whole")
    with pytest.raises(StopError):
        run(tmp_path / "cut", Stop())
    cut = run(tmp_path / "cut", resume=True)
    for one, other in zip(whole.experts, cut.experts, strict=True):
        assert file_hash(one) == file_hash(other)
        assert read_measurements(one) == read_measurements(other)
    logs = [(tmp_path / name / "logs/dots/metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"twins": 0}, "`twins` must be at least 1, but is 0"),
        ({"twins": [2, 0], "replaced": [1, 4]}, "`twins` must be at least 1, but is 0"),
        ({"twins": [2], "replaced": [1, 4]}, r"one for each of `replaced`, \[1, 4\], but is \[2\]"),
        ({"replaced": [0]}, "`replaced` must be at least 1, but is 0"),
        ({"every": 0}, "`every` must be at least 1, but is 0"),
        ({"replaced": []}, "`replaced` must hold at least one number of samples, but is empty"),
        ({"replaced": [9]}, r"`replaced` must lie in 0\.\.8, the reserve of task 'dots', but is 9"),
    ],
)
def test_bad_input_is_one_line(tiny_suite, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_suite, tmp_path / "out", StabilityTwins(**options))
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_each_number_of_replaced_samples_can_have_its_own_number_of_twins():
    """Two twins of one sample and one of four are carried, in this order."""
    carried = StabilityTwins(twins=[2, 1], replaced=[1, 4], null=False, rounding=False).places
    assert [(place.m, place.seed) for place in carried] == [(1, 0), (1, 1), (4, 0)]


def test_a_module_without_sample_positions_is_refused(tiny, fit):
    with pytest.raises(TypeError, match="whose batches tell which sample is which"):
        fit(tiny(), StabilityTwins())


def test_measurements_of_another_file_are_dropped(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"one")
    add_measurements(path, {"a": 1})
    add_measurements(path, {"b": 2})
    assert read_measurements(path) == {"a": 1, "b": 2}
    path.write_bytes(b"two")
    assert read_measurements(path) == {}
    add_measurements(path, {"c": 3})
    assert read_measurements(path) == {"c": 3}


SCRIPT = """
import sys
from pathlib import Path
from mergekit_lit.callbacks import StabilityTwins
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.stages.train import train_expert

suite, out, base, devices = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
train_expert(
    data=TaskDataModule(suite, "dots", batch=8, reserve=8),
    model=ExpertModule(base, image_size=8, lr=0.01, warmup_steps=2),
    steps=[8],
    out=out,
    trainer={"accelerator": "cpu", "devices": devices, "sync_batchnorm": True},
    callbacks=[StabilityTwins(twins=2, replaced=[4])],
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("base", [RESNET, VIT])
def test_two_processes_have_the_twins_of_one(tiny_suite, tmp_path, base):
    measured = []
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for devices in (1, 2):
        out = tmp_path / str(devices)
        command = [sys.executable, str(script), tiny_suite, str(out), base, str(devices)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
        measured.append(read_measurements(out / "dots.safetensors")["stability"])
    one, two = measured
    assert one["null"] == two["null"] == 0
    assert one["first_met"] == two["first_met"]
    assert two["replaced"]["4"]["each"] == pytest.approx(one["replaced"]["4"]["each"], rel=1e-3)
