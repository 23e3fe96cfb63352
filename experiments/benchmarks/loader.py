"""Measure which share of a ResNet-18 training step is spent on data.

Each step loads a batch, turns it into input and trains on it; the three are timed in turn, in
processor time, which a busy machine changes little. The same images are read from memory and mapped
from disk.

    python experiments/benchmarks/loader.py
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from mergekit_lit.core.seeds import generator
from mergekit_lit.data.batches import StepLoader
from mergekit_lit.data.splits import Images
from mergekit_lit.data.suites import load_suite
from mergekit_lit.data.transforms import augment, to_input

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SIZE = 32
TARGET = 0.10
WARM_UP = 3


def main() -> None:
    """Print the share for images in memory and on disk, plain and augmented."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each setting")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--suite", default="embedded8", help="where the images come from")
    parser.add_argument("--task", default="traffic_signs", help="which images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = load_suite(arguments.suite).task(arguments.task).load().train
    train = make_trainer(classes=int(images.y.max()) + 1)
    print(f"ResNet-18, {SIZE} px, batch {arguments.batch}, 1 thread, {arguments.steps} steps each")
    print("source   augmentation   load ms   input ms   train ms   data share (quartiles)")
    with tempfile.TemporaryDirectory() as folder:
        for source, stored in (("memory", images), ("disk", on_disk(images, Path(folder)))):
            for augmentation in ("none", "crop-flip"):
                loader = StepLoader(stored, batch=arguments.batch, steps=WARM_UP + arguments.steps)
                times = time_steps(loader, train, augmentation)[WARM_UP:]
                print(f"{source:8} {augmentation:13} {row(times)}")


def make_trainer(classes: int) -> Callable[[Tensor, Tensor], None]:
    """Return one training step of a ResNet-18: forward, backward, SGD with momentum."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def train(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()

    return train


def on_disk(images: Images, folder: Path) -> Images:
    """Return the same images mapped from a file, as large tasks are."""
    np.save(folder / "x.npy", images.x)
    mapped = Images(np.load(folder / "x.npy", mmap_mode="r"), images.y)
    return mapped.subset(np.arange(len(images)))


def time_steps(
    loader: StepLoader, train: Callable[[Tensor, Tensor], None], augmentation: str
) -> list[tuple[float, float, float]]:
    """Return the processor seconds of loading, making the input and training, step by step."""
    times = []
    batches = iter(loader)
    for step in range(len(loader)):
        start = time.process_time()
        x, y, _ = next(batches)
        loaded = time.process_time()
        x = augment(x, augmentation, generator(0, "augment", step))
        x = to_input(x, mean=MEAN, std=STD, size=SIZE)
        made = time.process_time()
        train(x, y)
        times.append((loaded - start, made - loaded, time.process_time() - made))
    return times


def row(times: list[tuple[float, float, float]]) -> str:
    """Return median milliseconds of each part, and the share of the data with its quartiles."""
    load, made, train = (1000 * statistics.median(part) for part in zip(*times, strict=True))
    low, middle, high = statistics.quantiles([(a + b) / (a + b + c) for a, b, c in times], n=4)
    kept = "kept" if high <= TARGET else "missed"
    share = f"{middle:.2%} ({low:.2%} to {high:.2%}), target {TARGET:.0%} {kept}"
    return f"{load:8.2f} {made:10.2f} {train:10.1f}   {share}"


if __name__ == "__main__":
    main()
