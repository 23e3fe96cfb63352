"""Every kind of fine-tuning ends in two gloo processes where it ends in one."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.models.backbones import load_base

VARIANTS = {
    "linearised": {"finetuning": "linearised"},
    "lora": {"finetuning": "lora", "lora_rank": 2},
    "sam": {"sam_radius": 0.1},
}
SCRIPT = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    from mergekit_lit.lit.data import TaskDataModule
    from mergekit_lit.lit.expert import ExpertModule
    from mergekit_lit.stages.train import train_expert

    suite, out, devices, variants = sys.argv[1:]
    options = {"image_size": 8, "lr": 0.01, "warmup_steps": 0, "norm_statistics": "frozen"}
    for name, changes in json.loads(variants).items():
        train_expert(
            data=TaskDataModule(suite, "dots", batch=12, reserve=8),
            model=ExpertModule("timm/test_resnet@random:0", **options, **changes),
            steps=[6],
            out=Path(out) / devices / name,
            trainer={"accelerator": "cpu", "devices": int(devices), "log_every_n_steps": 1},
        )
    """
)


@pytest.fixture(scope="module")
def folder(tiny_suite, tmp_path_factory):
    """Experts of every variant, trained in one process and in two."""
    folder = tmp_path_factory.mktemp("variants")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    for devices in ("1", "2"):
        words = [sys.executable, str(script), tiny_suite, str(folder), devices]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*words, json.dumps(VARIANTS)]
        subprocess.run(command, check=True, env=environment, timeout=500, cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_the_expert_of_one(folder, name):
    one, two = (load_expert(folder / devices / name / "dots.safetensors") for devices in "12")
    moved = 0.0
    base = load_base("timm/test_resnet@random:0", image_size=8)[1].params
    for key, tensor in one.backbone.items():
        if tensor.is_floating_point():
            # Sums run in another order.
            assert (two.backbone[key] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-6, key
            moved += float((tensor - base[key]).norm()) * one.structure[key].is_merged
    assert moved > 0.01
    assert two.card.batch == one.card.batch == 12
    assert two.card.train_loss == pytest.approx(one.card.train_loss, rel=1e-4)
    # Of low-rank factors the card tells no noise: it would not be that of the weights.
    noises = [expert.card.gradient_noise or 0.0 for expert in (one, two)]
    assert noises[1] == pytest.approx(noises[0], rel=1e-3)
    assert (noises[0] > 0) == (name != "lora")
