"""Two gloo processes must measure what one process measures on the same batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from mergekit_lit.callbacks import GradientNoise, GradientNorm, PathLength

torch.set_num_threads(1)
out, devices, steps = sys.argv[1], int(sys.argv[2]), 6

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        # Rank r takes samples r, r + 2 ...: each step's samples are those of one process.
        ranks = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        sampler = DistributedSampler(data, shuffle=False, **ranks)
        return DataLoader(data, batch_size=8 // devices, sampler=sampler)

class Rows(Callback):
    rows = []
    def on_train_batch_end(self, trainer, *_):
        self.rows.append({name: float(v) for name, v in trainer.callback_metrics.items()})

draw = torch.Generator().manual_seed(0)
data = TensorDataset(torch.randn(48, 3, 8, 8, generator=draw), torch.arange(48) % 3)
watchers = [GradientNorm(), GradientNoise(every=2), PathLength()]
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=steps,
    gradient_clip_val=0.3, accumulate_grad_batches=2, log_every_n_steps=1, max_epochs=-1,
    use_distributed_sampler=False,
    logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[*watchers, Rows()],
)
trainer.fit(Module())
facts = {}
for watcher in watchers:
    facts |= watcher.card_facts()
if trainer.is_global_zero:
    with open(out, "w") as file:
        json.dump({"rows": Rows.rows, "facts": facts}, file)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(folder: Path, devices: int):
    script, out = folder / "train.py", folder / f"{devices}.json"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script), str(out), str(devices)]
    done = subprocess.run(
        command,
        check=False,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    one, two = run(tmp_path, 1), run(tmp_path, 2)
    assert len(one["rows"]) == len(two["rows"]) == 12
    assert two["facts"] == pytest.approx(one["facts"], rel=1e-4)
    for left, right in zip(one["rows"], two["rows"], strict=True):
        assert right == pytest.approx(left, rel=1e-4)
    assert min(row.get("gradient/clip_factor", 1.0) for row in one["rows"]) < 1
