"""Pretrain the shipped initialisations on source tasks that share no image with `embedded8`.

    python experiments/pretraining/pretrain.py --backbone resnet
    python experiments/pretraining/pretrain.py --backbone vit --steps 14000 --teacher resnet

One backbone, one linear head per source task, batches mixed from all tasks; with `--teacher` it
learns that base's features of the same views beside the labels. Writes the exponential moving
average of the weights as mergekit_lit/models/files/<backbone>.safetensors in half precision.
One core, about 20 minutes for the ResNet and 50 for the ViT. A run that was cut off goes on from
its checkpoint.
"""

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from augmentation import random_views
from sources import Pool, make_pool, without_shared_classes
from teacher import Teacher, distillation, make_teacher
from torch import Tensor, nn

from mergekit_lit.core.expert_files import save_base
from mergekit_lit.models.backbones import Backbone, build_backbone, describe_base

FILES = Path(__file__).parents[2] / "mergekit_lit" / "models" / "files"


def masked_logits(features: Tensor, head: nn.Linear, pool: Pool, task: Tensor) -> Tensor:
    """Return logits over all classes, those of other tasks at minus infinity."""
    classes = torch.arange(int(pool.first[-1]))
    low, high = pool.first[task].unsqueeze(1), pool.first[task + 1].unsqueeze(1)
    return head(features).masked_fill((classes < low) | (classes >= high), -math.inf)


def smoothed_loss(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy with label mass spread over the classes of the image's own task."""
    log_p = logits.log_softmax(dim=1)
    own = log_p.isfinite()
    spread = log_p.masked_fill(~own, 0).sum(dim=1) / own.sum(dim=1)
    right = log_p.gather(1, y.unsqueeze(1)).squeeze(1)
    return -((1 - smoothing) * right + smoothing * spread).mean()


def draw_batch(pool: Pool, batch: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return views, and which images they show; a task is drawn by the root of its size."""
    sizes = torch.bincount(pool.task).double()
    chosen = torch.multinomial(sizes.rsqrt()[pool.task], batch, replacement=True, generator=draw)
    x = pool.x[chosen].permute(0, 3, 1, 2).float() / 255
    return random_views(x, pool.plain[chosen], draw), chosen


def step_batch(pool: Pool, options: argparse.Namespace, step: int) -> tuple[Tensor, Tensor]:
    """Return one step's normalised views, and which images they show."""
    draw = torch.Generator().manual_seed(1_000_003 * options.seed + step)
    x, chosen = draw_batch(pool, options.batch, draw)
    return normalised(x), chosen


def objective(
    model: nn.ModuleDict,
    teacher: Teacher | None,
    pool: Pool,
    options: argparse.Namespace,
    step: int,
) -> Tensor:
    """Return the loss of one step's batch: labels, and the teacher where there is one."""
    x, chosen = step_batch(pool, options, step)
    features = model["backbone"](x)
    logits = masked_logits(features, model["head"], pool, pool.task[chosen])
    loss = smoothed_loss(logits, pool.y[chosen], options.smoothing)
    if teacher is not None:
        taught = distillation(model["guess"](features), teacher(x))
        loss = loss + options.teacher_weight * taught
    return loss


def normalised(x: Tensor) -> Tensor:
    """Return pixels in [0, 1] as the shipped backbones expect them."""
    return (x - 0.5) / 0.5


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move the average towards the model; its memory grows to a thousand steps."""
    decay = min(0.999, (1 + step) / (10 + step))
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    for mean, now in pairs:
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)


@torch.no_grad()
def accuracies(model: nn.ModuleDict, pool: Pool) -> dict[str, float]:
    """Return the share right of each source task."""
    model.eval()
    right = []
    for rows in torch.arange(len(pool.x)).split(500):
        x = normalised(pool.x[rows].permute(0, 3, 1, 2).float() / 255)
        logits = masked_logits(model["backbone"](x), model["head"], pool, pool.task[rows])
        right.append(logits.argmax(dim=1) == pool.y[rows])
    hits = torch.cat(right).double()
    return {n: round(float(hits[pool.task == i].mean()), 4) for i, n in enumerate(pool.names)}


def train(pool: Pool, teacher: Teacher | None, options: argparse.Namespace) -> nn.ModuleDict:
    """Return the averaged model after all steps."""
    torch.manual_seed(options.seed)
    backbone = build_backbone(options.backbone)
    model = nn.ModuleDict(
        {
            "backbone": backbone,
            "head": nn.Linear(backbone.features, int(pool.first[-1])),
            "guess": nn.Linear(backbone.features, teacher.backbone.features if teacher else 1),
        }
    )
    average = copy.deepcopy(model).eval()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)
    start = resume(options.checkpoint, model, average, optimizer)
    began = time.perf_counter()
    for step in range(start, options.steps):
        warm = min(1.0, (step + 1) / 200)
        rate = options.lr * warm * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        loss = objective(model, teacher, pool, options, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        follow(average, model, step)
        if (step + 1) % 500 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1} loss {loss.item():.3f} seconds {seconds:.0f}", flush=True)
            keep(options.checkpoint, step + 1, model, average, optimizer)
    return average


def keep(path: Path, step: int, model: Any, average: Any, optimizer: Any) -> None:
    """Write what the run needs to go on."""
    parts = {"model": model, "average": average, "optimizer": optimizer}
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": step, **state}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def resume(path: Path, model: Any, average: Any, optimizer: Any) -> int:
    """Load a checkpoint if there is one, and return the steps done."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in (("model", model), ("average", average), ("optimizer", optimizer)):
        part.load_state_dict(state[name])
    return int(state["step"])


def write(
    backbone: Backbone, pool: Pool, options: argparse.Namespace, facts: dict[str, Any]
) -> None:
    """Write the base file, with what was done in its header."""
    told = {n: getattr(options, n) for n in ("steps", "batch", "lr", "seed")}
    if options.teacher:
        told |= {"teacher": options.teacher, "teacher_weight": options.teacher_weight}
    base = describe_base(backbone, options.backbone, {"seen": list(pool.names), **told, **facts})
    save_base(options.out / f"{options.backbone}.safetensors", base, dtype=torch.float16)


def main() -> None:
    """Check the sources, train, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=("resnet", "vit"), required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--teacher", help="spec of a base, as `load_base` takes it")
    parser.add_argument("--teacher-weight", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FILES)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.checkpoint is None:
        options.checkpoint = options.out / f".{options.backbone}.ckpt"
    torch.set_num_threads(1)
    pool = make_pool("train")
    pool, found = without_shared_classes(pool)
    print(found, flush=True)
    teacher = None
    if options.teacher:
        views = (step_batch(pool, options, step)[0] for step in range(20))
        teacher = make_teacher(options.teacher, views)
    model = train(pool, teacher, options)
    reached = accuracies(model, make_pool("test"))
    print(reached)
    facts = {"accuracy": reached, **found}
    backbone: Any = model["backbone"]
    write(backbone, pool, options, facts)


if __name__ == "__main__":
    main()
