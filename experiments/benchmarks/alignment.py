"""What alignment gains between two initialisations: python experiments/benchmarks/alignment.py.

Two networks are trained from two random initialisations, on one task or on one each, and merged
half and half. Prints a table in Markdown: accuracy and loss of the merge on each task's test images
(on one task with the mean of the two heads, on two with each task's own), and the barrier: that
loss less the mean loss of the two networks. The record goes to runs/alignment/<names>.json.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.params import Params
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.heads import Head
from mergekit_lit.lit.passes import score
from mergekit_lit.lit.recalibration import calibration_images, merge_calibrated
from mergekit_lit.merging import git_rebasin
from mergekit_lit.models.backbones import Backbone, load_base
from mergekit_lit.models.statistics import has_statistics
from mergekit_lit.stages.train import train_expert

FOLDER = Path("runs") / "alignment"
POLICIES: dict[bool, tuple[BatchNormPolicy, ...]] = {
    True: ("average", "recalibrate-per-task"),
    False: ("base",),
}


def main() -> None:
    """Parse the arguments, train, merge, print a table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet")
    parser.add_argument("--suite", default="embedded8")
    parser.add_argument("--tasks", nargs="+", default=["mnist"], help="one, or one a network")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=0.03, help="of SGD with momentum 0.9, cosine")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=256, help="of each task, that methods see")
    parser.add_argument("--until", nargs="*", default=[], help="stages to zip in part up to")
    parser.add_argument("--out", type=Path, help=f"record; by default in {FOLDER}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stopwatch = Stopwatch()
    experts, data = trained(options)
    rows = list(measured(experts, data, options))
    print("\n".join(table(rows)))
    record = Record(
        stage="merge",
        name="alignment",
        config={name: value for name, value in vars(options).items() if name != "out"},
        inputs={task.name: task.split_hash for task in data},
        seeds={"networks": 0},
        metrics={"rows": rows},
    )
    out = options.out or FOLDER / f"{options.backbone}-{'-'.join(options.tasks)}.json"
    stopwatch.finish(record).write(out)
    print(f"record: {out}")


def trained(options: argparse.Namespace) -> tuple[Experts, list[TaskData]]:
    """Return two experts from two initialisations, and the task of each."""
    found, tasks = [], []
    for seed, task in enumerate((options.tasks * 2)[:2]):
        data = TaskDataModule(options.suite, task, batch=options.batch)
        spec = f"{options.backbone}@random:{seed}"
        model = ExpertModule(spec, head="trained", lr=options.lr, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            result = train_expert(data=data, model=model, steps=[options.steps], out=Path(folder))
            expert = load_expert(result.experts[0])
            found.append(replace(expert, backbone=dict(expert.backbone)))
        tasks.append(data.task_data)
    _, base = load_base(f"{options.backbone}@random:0")
    experts = Experts(
        base=base.params,
        tuned=[expert.backbone for expert in found],
        structure=base.structure,
        cards=[expert.card for expert in found],
        heads=[expert.head for expert in found],
        names=["first", "second"],
        base_name=base.name,
        base_hash=base.content,
        backbone=base.backbone,
        image_size=base.image_size,
    )
    return experts, tasks


def measured(
    experts: Experts, data: Sequence[TaskData], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield one row for the networks themselves, then one for each way to merge them."""
    backbone, _ = load_base(f"{options.backbone}@random:0")
    alone = [
        tested(backbone, tuned, head, task)
        for tuned, head, task in zip(experts.tuned, experts.heads, data, strict=True)
    ]
    yield row("each network alone", "its own", alone, alone)
    images = {
        name: calibration_images(task.train, task.name, count=options.images)
        for name, task in zip(experts.names, data, strict=True)
    }
    aligned = git_rebasin(experts)
    keeps = has_statistics(experts.structure)
    ways = [("average", experts, "average", {}), ("git_rebasin", aligned, "average", {})]
    ways += [("zipit", experts, "zipit", {})]
    ways += [
        (f"zipit until {stage}", experts, "zipit", {"until": stage}) for stage in options.until
    ]
    # Where there is BatchNorm, `recalibrate` is what REPAIR does.
    ways += [] if keeps else [("git_rebasin, repair", aligned, "repair", {})]
    for policy in POLICIES[keeps]:
        for label, given, method, config in ways:
            merged = merge_calibrated(
                given,
                method,
                {"train": images},
                backbone=backbone,
                config=config,
                batch_norm=policy,
            )
            yield row(label, policy, halves(backbone, merged, data), alone)


def halves(
    backbone: Backbone, merged: Merged, data: Sequence[TaskData]
) -> list[tuple[float, float]]:
    """Return accuracy and loss of a merge, on each task if there are two."""
    heads = list(merged.heads.values())
    if data[0].name == data[1].name:
        mean = {key: (heads[0][key] + heads[1][key]) / 2 for key in heads[0]}
        return [tested(backbone, merged.for_task("first"), mean, data[0])]
    return [
        tested(backbone, merged.for_task(name), head, task)
        for name, head, task in zip(merged.heads, heads, data, strict=True)
    ]


def tested(backbone: Backbone, params: Params, head: Params, task: TaskData) -> tuple[float, float]:
    """Return accuracy and loss on a task's test images."""
    backbone.load_state_dict(dict(params))
    layer: nn.Module = Head(head, trained=False)
    found = score(backbone.eval(), layer.eval(), task.test)
    if found.accuracy is None or found.loss is None:
        raise ValueError(f"Task {task.name!r} must have test images, but has none.")
    return found.accuracy, found.loss


def row(
    merge: str,
    statistics: str,
    found: Sequence[tuple[float, float]],
    alone: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """Return one row of the table."""
    losses = [sum(loss for _, loss in part) / len(part) for part in (found, alone)]
    return {
        "merge": merge,
        "statistics": statistics,
        "accuracies": [accuracy for accuracy, _ in found],
        "loss": losses[0],
        "barrier": losses[0] - losses[1],
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the rows in Markdown."""
    lines = ["| merge | BatchNorm | test accuracy | loss | barrier |", "|---|---|---|---|---|"]
    for found in rows:
        accuracies = ", ".join(f"{accuracy:.3f}" for accuracy in found["accuracies"])
        lines.append(
            f"| {found['merge']} | {found['statistics']} | {accuracies} | {found['loss']:.3f} | "
            f"{found['barrier']:+.3f} |"
        )
    return lines


if __name__ == "__main__":
    main()
