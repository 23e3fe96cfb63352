"""This file predicts what merging experts of different bases costs, and whether to merge them.

Merges that were measured are of experts of one base, and tell nothing here. What does: how far the
bases lie apart, before and after their units are aligned, beside how far the experts travelled; and
with images, validation scores of each way to merge beside those of single networks.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.models.backbones import build_backbone
from mergekit_lit.search.predicting.columns import Level
from mergekit_lit.search.predicting.looking import check_heads
from mergekit_lit.search.predicting.origins import Origins, open_origins
from mergekit_lit.search.predicting.recording import images_at, record_path, recorded
from mergekit_lit.search.predicting.singles import POLICY, Bench, Looked, mean_of
from mergekit_lit.search.predicting.verdict import Way, verdict
from mergekit_lit.stages.bound import check_same_images
from mergekit_lit.stages.images import Calibration


def predict_initialisations(
    experts: Sequence[Path],
    *,
    level: Level = "cards",
    calibration: Calibration | None = None,
    out: Path | None = None,
) -> Record:
    """Predict what merging experts of different bases costs, and say whether to.

    Args:
        experts: one file per expert, each of another task, all of one architecture.
        level: what is looked at: `cards` and weights; or, alike for `data` and `probe`, training
            and validation images too: every way to merge is scored on them.
        calibration: where the images come from, for the levels that look at some.
        out: as `predict_files` takes it.

    Returns:
        A record, whose metrics are `initialisations`: the `bases`; how far they lie `apart`; each
        of the `ways` to merge with its stretch, the cost in nats that weights and cards make
        expect, and the accuracy and cost on validation images; the best `single` network; the
        `verdict` with its rule; and the `command` that follows it. Besides `coverage`, the share
        of outcomes that intervals are to hold, and `warnings`.

    Raises:
        FileNotFoundError: an expert is missing.
        ValueError: experts that cannot be merged, or no suite for a level that looks at images.
    """
    watch = Stopwatch()
    # Before any work.
    record_path(out)
    images = images_at(level, calibration)
    origins = open_origins(experts)
    bench = _bench(origins.experts, images) if images else None
    told = told_of(origins, look(origins, bench) if bench else None)
    told["command"] = _command(experts, told["verdict"]["method"], calibration)
    return recorded(
        watch,
        out,
        experts,
        calibration,
        config={"level": level},
        metrics={"initialisations": told},
        title="Whether to merge experts of different bases",
    )


def told_of(origins: Origins, looked: Looked | None = None) -> dict[str, Any]:
    """Return what is known of merging experts, and the verdict, as `predict_initialisations` does.

    Args:
        origins: the experts.
        looked: what networks do on images of their tasks; None where no image is looked at.
    """
    ways, rows = [], []
    for method in origins.ways():
        geometry = origins.geometry(method)
        scores = looked.scores(method) if looked else {}
        ways.append(Way(method, geometry["stretch"], scores.get("gain")))
        told = {name: asdict(interval) for name, interval in scores.items()}
        tasks = looked.tasks(method) if looked else None
        rows.append({"method": method, **geometry, **told, "tasks": tasks})
    return {
        "bases": origins.told(),
        "apart": origins.apart(),
        "ways": rows,
        "chance": origins.chance(),
        "single": looked.best if looked else None,
        "single_accuracy": asdict(looked.accuracy(looked.best)) if looked else None,
        "kept_apart": asdict(mean_of(looked.kept, "correct")) if looked else None,
        "verdict": asdict(verdict(ways)),
    }


def look(origins: Origins, bench: Bench) -> Looked:
    """Score every way to merge, and every network that needs no merge."""
    experts = origins.experts
    alone = {
        name: bench.scores(bench.single(experts, tuned, own=name))
        for name, tuned in zip(experts.names, experts.tuned, strict=True)
    }
    singles = {f"the expert of {name!r}": scored for name, scored in alone.items()}
    singles |= {
        f"the base {base.name!r} ({content[:8]})": bench.scores(bench.single(experts, base.params))
        for content, base in origins.bases.items()
        if base is not None
    }
    merges = {
        method: bench.scores(bench.merged(given, merged_by))
        for method, (given, merged_by) in origins.ways().items()
    }
    return Looked(merges, singles, {name: scored[name] for name, scored in alone.items()})


def _bench(experts: Experts, calibration: Calibration) -> Bench:
    """Return what scores networks on images of the experts' tasks.

    Raises:
        ValueError: an expert has no head, or images that it was not trained on.
    """
    check_heads(experts)
    tasks = list(calibration.tasks(experts.names))
    check_same_images(experts, tasks)
    backbone = build_backbone(experts.backbone, experts.image_size)
    return Bench(backbone, tasks, images=calibration.images)


def _command(
    experts: Sequence[Path], method: str | None, calibration: Calibration | None
) -> str | None:
    """Return the command that follows the verdict, where it is to merge."""
    if method is None:
        return None
    suite = calibration.suite if calibration else "SUITE"
    words = [*map(str, experts), "--method", method, "--allow_different_base", "true"]
    words += ["--batch_norm", POLICY, "--data.suite", suite, "--out", "merged.safetensors"]
    return f"mergekit-lit merge {shlex.join(words)}"
