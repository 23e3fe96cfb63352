"""What evaluation costs over a bare torch loop: python experiments/benchmarks/evaluation.py.

One model with a head for each task is scored on every test image of a suite by (1) a bare loop that
counts right images and sums losses, (2) `evaluate_models`, (3) `Trainer.test` on a `MergeModule`.
Repeats are interleaved; the figures are processor time over that of the bare loop beside it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.nn.functional import cross_entropy

from mergekit_lit.core.experts import Merged
from mergekit_lit.core.files import write_json
from mergekit_lit.data.transforms import to_input
from mergekit_lit.lit.merge import MergeModule
from mergekit_lit.lit.quiet import quiet
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.models.backbones import Backbone, load_base
from mergekit_lit.models.heads import trained_init
from mergekit_lit.stages.evaluate import evaluate_models


def main() -> None:
    """Parse the arguments, measure, print a table, and write a JSON file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="resnet@random:0", help="spec of the backbone")
    parser.add_argument("--suite", default="embedded8", help="name or folder of the suite")
    parser.add_argument("--split", default="test", help="train, val or test")
    parser.add_argument("--batch", type=int, default=256, help="images in one batch")
    parser.add_argument("--repeats", type=int, default=9, help="repeats of each way")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = MergeDataModule(options.suite, split=options.split, batch=options.batch)
    data.setup()
    backbone, merged = _model(options.base, data)
    found = _measure(_ways(backbone, merged, data), options.repeats)
    images = sum(len(getattr(task, options.split)) for task in data.task_data)
    print(f"{options.base}, {images} images of {options.suite}, batch {options.batch}, 1 thread")
    print("| way | CPU s (median) | over the bare loop | lowest to highest |")
    print("|---|---|---|---|")
    for name, row in found.items():
        spread = f"{row['lowest']:.3f} to {row['highest']:.3f}"
        print(f"| {name} | {row['seconds']:.3f} | {row['ratio']:.3f} | {spread} |")
    if options.out:
        write_json(options.out, {"images": images, "base": options.base, "ways": found})


def _model(spec: str, data: MergeDataModule) -> tuple[Backbone, Merged]:
    """Return a backbone and a model that has a drawn head for each task."""
    backbone, base = load_base(spec)
    heads = {
        task.name: trained_init(backbone.features, len(task.classes), seed=0)
        for task in data.task_data
    }
    return backbone.eval(), Merged(base.params, base.structure, heads=heads)


def _ways(
    backbone: Backbone, merged: Merged, data: MergeDataModule
) -> dict[str, Callable[[], object]]:
    """Return the three ways; what all of them need once, images in memory, is done before."""
    models = {"merged": merged}
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    module = MergeModule(backbone, models)

    def test() -> None:
        with quiet():
            trainer.test(module, datamodule=data, verbose=False)

    return {
        "bare torch loop": lambda: _bare(backbone, merged, data),
        "evaluate_models": lambda: evaluate_models(
            backbone, models, data.task_data, split=data.split, batch=data.batch
        ),
        "Trainer.test(MergeModule)": test,
    }


@torch.inference_mode()
def _bare(
    backbone: Backbone, merged: Merged, data: MergeDataModule
) -> dict[str, tuple[float, float]]:
    """Score the model the way that a notebook would: accuracy and mean loss of each task."""
    scores = {}
    for task in data.task_data:
        images = getattr(task, data.split)
        backbone.load_state_dict(merged.for_task(task.name))
        head = merged.heads[task.name]
        right, loss = 0, 0.0
        for start in range(0, len(images), data.batch):
            part = slice(start, start + data.batch)
            x = torch.tensor(images.x[part])
            y = torch.tensor(images.y[part])
            inputs = to_input(x, mean=backbone.mean, std=backbone.std, size=backbone.image_size)
            logits = backbone(inputs) @ head["weight"].T + head["bias"]
            right += int((logits.argmax(1) == y).sum())
            loss += float(cross_entropy(logits, y, reduction="sum"))
        scores[task.name] = (right / len(images), loss / len(images))
    return scores


def _measure(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Return processor seconds and ratios to the first way, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, run in ways.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    first = next(iter(seconds.values()))[1:]
    rows = {}
    for name, taken in seconds.items():
        ratios = [mine / bare for mine, bare in zip(taken[1:], first, strict=True)]
        rows[name] = {
            "seconds": statistics.median(taken[1:]),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return rows


if __name__ == "__main__":
    main()
