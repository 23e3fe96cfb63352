"""This file writes the report: one HTML page that needs no other file and no network."""

import json
from collections.abc import Mapping, Sequence

from mergekit_lit.core.records import Record, plain
from mergekit_lit.reports import figures, tables
from mergekit_lit.reports.bounds import bounds_section
from mergekit_lit.reports.commands import command_line
from mergekit_lit.reports.markup import (
    Cell,
    block,
    definitions,
    document,
    escaped,
    flags,
    folded,
    measured,
    paragraph,
    section,
    table,
)
from mergekit_lit.reports.predictions import predictions_section
from mergekit_lit.reports.runs import Run, Series
from mergekit_lit.reports.tables import Score

MEANINGS: Mapping[str, str] = {
    "base": "The shared initialisation before any fine-tuning, scored on each task with the task's "
    "own head.",
    "experts": "The base fine-tuned on one task; each expert is scored on its own task alone.",
    "merge": "One backbone made of all experts by a merge method; it serves every task, each "
    "through its own head.",
    "accuracy": "Share of images whose most likely class is the right one, from 0 to 1. The mean "
    "weighs every task alike.",
    "interval": "[low, high]: 95 % bootstrap interval over the evaluated images. It tells how far "
    "another sample of images could move the number; it does not cover another training seed.",
    "normalised accuracy": "Accuracy divided by the accuracy of the task's own expert on the same "
    "images, then averaged: 1 means as good as keeping every expert.",
    "cross-entropy": "Mean negative log-probability of the right class, in nats; lower is better.",
    "calibration error": "Expected gap between the model's confidence and its accuracy, from 0 to "
    "1; lower is better.",
    "data": "What the merge method uses beside the experts: nothing, their cards (the facts of "
    "their training), training or validation data, or unlabelled test images. Methods of the last "
    "kind adapt to the test set and are never ranked with the others.",
    "λ (scale)": "Length of the merged step from the base. It is chosen on validation images alone "
    "(ties go to the smaller); test images are used once, for the table.",
    "delta": "τ, the difference between an expert's weights and the base's. Deltas with a cosine "
    "near 0 disturb each other little; negative cosines pull against each other.",
    "gradient norm": "L2 norm of the gradient of all trained weights in one step, before clipping.",
    "travel": "Sum of learning rates times the optimizer's effective steps: how far the "
    "optimizer could have gone per unit of gradient.",
    "terms of the bound": "What the excess error of a merge is at most, term by term, by our "
    "reconstruction: progress is the loss at the base less what the step gains; drift and mismatch "
    "come of steps taken away from it; noise of small batches; divergence of shares that are not "
    "the target's; generalization of what one training image changes. Vacuous: not proved here.",
    "displacement": "L2 distance between the expert's weights and the base's at the end.",
}
"""What each number on the page means, in the order in which a reader meets them."""

_CARD_COLUMNS = (
    ("n", "images", 0),
    ("steps", "steps", 0),
    ("batch", "batch", 0),
    ("lr", "learning rate", 4),
    ("travel", "travel", 2),
    ("displacement", "displacement", 3),
    ("gradient_norm", "mean gradient norm", 3),
    ("train_loss", "train loss", 3),
    ("train_accuracy", "train accuracy", 3),
    ("val_accuracy", "val accuracy", 3),
)
_LOSS = ("train/loss", "loss", "train_loss")
_GRADIENT = ("gradient/norm",)


def report_page(run: Run, *, title: str) -> str:
    """Return the whole page of a run: results, figures, meanings and provenance."""
    scored = [record for record in run.records if record.metrics.get("models")]
    body = [_opening(title, scored)]
    body += [_results(record) for record in scored]
    body += [_coefficients(record) for record in run.records]
    body += [predictions_section(run.records)]
    body += [_geometry(run.records), bounds_section(run.records, run.curves)]
    body += [_training(run), section("What each number means", definitions(MEANINGS))]
    body += [_provenance(run)]
    return document(title, *body)


def _opening(title: str, scored: Sequence[Record]) -> str:
    parts = [f"<h1>{escaped(title)}</h1>"]
    if scored:
        rows = tables.scores(scored[-1])
        said = tables.verdict(rows)
        if said is not None:
            parts.append(paragraph(said[1], class_="lead"))
        parts.append(_key_figures(tables.means(rows)))
    return f"<header>{''.join(parts)}</header>"


def _key_figures(averages: Sequence[Score]) -> str:
    """Return the three numbers that matter most, large: base, the merge to quote, experts."""
    base = next((row for row in averages if row.role == "base"), None)
    experts = next((row for row in averages if row.role == "expert"), None)
    shown = [row for row in (base, tables.headline(averages), experts) if row is not None]
    items = "".join(
        f'<li class="{row.role}"><b>{row.accuracy:.3f}</b>'
        f"<span>{escaped(row.model)}<br>{tables.interval(row.interval)}</span></li>"
        for row in shown
    )
    return f'<ul class="key">{items}</ul>' if items else ""


def _results(record: Record) -> str:
    rows = tables.scores(record)
    averages = tables.means(rows)
    order = [row.model for row in averages]
    names = tables.tasks(rows)
    drawn = {"": figures.accuracy_panel(f"Mean of {len(names)} tasks", averages, near=True)}
    for task in names:
        found = tables.by_task(rows, task)
        drawn[task] = figures.accuracy_panel(task, [found[m] for m in order if m in found])
    split = averages[0].split
    return section(
        f"Accuracy on {split} images",
        flags(record.metrics.get("warnings", ())),
        _mean_table(averages, split),
        paragraph(
            "A dot is a model, its bar the 95 % interval; dashed lines mark the base and the "
            "experts. The axis of the mean is cut to what is needed, the others run from 0 to 1.",
            class_="soft",
        ),
        figures.panels(drawn),
        folded("The same per task, as a table", _task_table(rows, order, names)),
    )


def _mean_table(averages: Sequence[Score], split: str) -> str:
    columns = (
        "model",
        "mean accuracy",
        "normalised",
        "λ",
        "data used",
        "cross-entropy",
        "calibration error",
    )
    rows = [
        [
            Cell(row.model),
            measured(row.accuracy, row.interval),
            measured(row.normalised, row.normalised_interval),
            Cell("" if row.scale is None else f"{row.scale:g}", row.scale),
            Cell(tables.DATA_WORDS.get(row.data or "", row.data or "")),
            measured(row.loss),
            measured(row.calibration_error),
        ]
        for row in averages
    ]
    return table(f"Means over the tasks, {split} images", columns, rows)


def _task_table(rows: Sequence[Score], order: Sequence[str], names: Sequence[str]) -> str:
    body = []
    for task in names:
        found = tables.by_task(rows, task)
        scored = [found.get(model) for model in order]
        cells = [
            measured(row.accuracy, row.interval) if row else Cell(tables.UNKNOWN) for row in scored
        ]
        n = next(row.n for row in found.values())
        body.append([Cell(task), Cell(tables.UNKNOWN if n is None else str(n), n), *cells])
    return table("Accuracy of each model on each task", ("task", "images", *order), body)


def _coefficients(record: Record) -> str:
    curves = record.metrics.get("coefficients", {})
    drawn = {
        name: figures.coefficient_panel(
            name,
            list(zip(curve["scale"], curve["normalised_accuracy"], strict=True)),
            curve["chosen"],
        )
        for name, curve in curves.items()
    }
    if not drawn:
        return ""
    return section(
        "How λ was chosen",
        paragraph(
            "Mean normalised accuracy on validation images by the length λ of the merged step; the "
            "dashed line is λ = 0, the base. The large dot is the choice."
        ),
        figures.panels(drawn),
    )


def _geometry(records: Sequence[Record]) -> str:
    """Return the section of the newest merge that watched the experts' deltas."""
    seen = [record.metrics.get("observers", {}).get("DeltaGeometry") for record in records]
    found = [geometry for geometry in seen if geometry]
    if not found:
        return ""
    names, overall = found[-1]["experts"], found[-1]["global"]
    norms = zip(names, overall["norms"], strict=True)
    body = [[Cell(name), measured(norm, digits=4)] for name, norm in norms]
    cancelled = overall.get("cancellation")
    lost = "" if cancelled is None else f" A plain sum of the deltas loses {cancelled:.0%} of all "
    drawn = {"Cosine": figures.cosine_figure(names, overall["cosine"])}
    if overall.get("sign_conflict"):
        drawn["Sign conflict"] = figures.conflict_figure(names, overall["sign_conflict"])
    return section(
        "How the experts' deltas lie to each other",
        paragraph(
            "Over all merged weights, for each two experts: first the cosine between their deltas; "
            "then the sign conflict, the share of the weights moved by both that they move in "
            "opposite directions: 0.5 for experts that know nothing of each other, less where they "
            "agree, more where they undo each other's work."
            + (lost and f"{lost}movement, where they pull against each other.")
        ),
        figures.panels(drawn, wide=True),
        folded("Lengths of the deltas", table("L2 norm of each delta", ("expert", "norm"), body)),
    )


def _training(run: Run) -> str:
    drawn = {}
    for task, series in run.curves.items():
        loss, gradient = (_first(series, names) for names in (_LOSS, _GRADIENT))
        if loss or gradient:
            drawn[task] = figures.training_panel(task, loss, gradient)
    cards = {name: card.to_json() for name, card in run.cards.items()}
    columns = [
        entry
        for entry in _CARD_COLUMNS
        if any(card[entry[0]] is not None for card in cards.values())
    ]
    body = [
        [Cell(name), *(measured(card[key], digits=digits) for key, _, digits in columns)]
        for name, card in cards.items()
    ]
    heads = ("expert", *(name for _, name, _ in columns))
    return section(
        "Training of the experts",
        paragraph("Faint: each logged step. Solid: moving mean.", class_="soft") if drawn else "",
        figures.panels(drawn) if drawn else "",
        table("What each expert's card says", heads, body) if body else "",
    )


def _provenance(run: Run) -> str:
    parts = []
    for record in run.records:
        facts = {
            "command": command_line(record, out=str(run.folder)),
            "commit": record.git_commit or "unknown",
            "seeds": ", ".join(f"{name} {seed}" for name, seed in record.seeds.items()) or "none",
            "versions": ", ".join(f"{name} {text}" for name, text in record.versions.items()),
            "finished": f"{record.finished}, after {record.seconds:.1f} s",
        }
        told = block(json.dumps(plain(record.config), indent=2, sort_keys=True))
        last = record is run.records[-1]
        parts.append(folded(f"{record.stage}: {record.name}", definitions(facts), told, open_=last))
    return section("Where the numbers come from", *parts)


def _first(series: Mapping[str, Series], names: Sequence[str]) -> Series:
    return next((series[name] for name in names if name in series), [])
