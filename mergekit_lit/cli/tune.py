"""This file is `mergekit-lit tune`: methods and their parameters, chosen on validation images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.calibration import calibration
from mergekit_lit.cli.method_flags import veneers
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_parameters, command_parser, instantiated, parse
from mergekit_lit.cli.saving import config_texts, write_config
from mergekit_lit.core.records import Record
from mergekit_lit.lit.run_facts import LoggerKind
from mergekit_lit.search.tuning.plan import TuningPlan, told
from mergekit_lit.search.tuning.tune import tune_files

_USAGE = (
    "EXPERT ... --method NAME[,NAME ...] [--budget N] --data.suite SUITE --out FOLDER [options]"
)


# Each argument is one flag of the command line, hence so many.
def options(  # noqa: PLR0913
    experts: list[Path],
    *,
    out: Path,
    then: list[str | dict[str, Any]] | None = None,
    space: dict[str, Any] | None = None,
    weights: dict[str, float] | str | None = None,
    base: str | None = None,
    allow_different_base: bool = False,
    logger: LoggerKind = "csv",
    json: bool = False,
) -> None:
    """Say what is merged, and how the result is told.

    Args:
        experts: one file per expert, each of another task, all of one base.
        out: folder of the search: `best.safetensors` and its record, `trials.jsonl` and
            `trials.csv`, `tune.record.json`. The same command goes on where a killed one stopped.
        then: veneers that every candidate gets, such as `--then lines`: what is done to the experts
            before the method or to its result after it; with parameters
            `{name: lines, config: {alpha: 0.2}}`.
        space: values of parameters in place of the ranges that the methods declare, such as
            `--space.scale 0.1,0.3,1`: those of the grid, or with Optuna the ends of a range; one
            value fixes a parameter.
        weights: weight of each task for the objective `weighted`, such as `mnist=2,letters=0.5`;
            1 for those not named.
        base: the base, if not the one that the first card names.
        allow_different_base: whether to take experts whose card names another base, or none.
        logger: `csv` (the files alone), `tensorboard`, `wandb` (offline) or `wandb-online`: one run
            with the table of trials, and the best model as its artifact.
        json: whether to print the record as JSON, and nothing else.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = _parser()
    namespace = parse(parser, argv, positional="experts")
    texts = config_texts(parser, argv, namespace, positional="experts")
    given = dict(vars(instantiated(parser, namespace)))
    json, images = given.pop("json"), calibration(**vars(given.pop("data")))
    if images is None:
        raise ValueError("`data.suite` must name the suite of the experts' tasks, but does not.")
    ours = ("experts", "out", "base", "allow_different_base", "logger")
    files = {name: given.pop(name) for name in ours}
    plan = TuningPlan(
        space={name: _listed(values) for name, values in (given.pop("space") or {}).items()},
        weights=_weights(given.pop("weights")),
        then=veneers(given.pop("then")),
        **given,
    )
    result = tune_files(**files, plan=plan, calibration=images, quiet=json)
    write_config(texts, Path(files["out"]) / "config")
    if json:
        print_json(vars(result.record))
    else:
        _print(result.record)
        print(result.best)
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser("tune", COMMANDS["tune"], usage=_USAGE)
    add_parameters(parser, options)
    parser.add_class_arguments(TuningPlan, skip={"space", "weights", "then"})
    parser.add_function_arguments(calibration, "data")
    return parser


def _listed(values: Any) -> list[Any]:
    """Return the values of one parameter: from a list, from `a,b` on a line, or from one value."""
    if isinstance(values, str):
        return list(yaml.safe_load(values if values.startswith("[") else f"[{values}]"))
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _weights(given: Mapping[str, float] | str | None) -> dict[str, float]:
    """Return weights by task from a mapping or from `task=number,...`."""
    if not isinstance(given, str):
        return dict(given or {})
    weights = {}
    for part in given.split(","):
        task, _, number = part.partition("=")
        try:
            weights[task.strip()] = float(number)
        except ValueError:
            raise ValueError(
                f"`weights` must be written as TASK=NUMBER,TASK=NUMBER, but {part!r} is not."
            ) from None
    return weights


def _print(record: Record) -> None:
    """Print a row for each method, and what they are to be compared with."""
    metrics = record.metrics
    rows = [
        {
            **found,
            "method": name,
            "chosen": told(found["chosen"]) + (" (given up)" if found["state"] != "scored" else ""),
            "defaults": found["defaults"] and found["defaults"]["value"],
            "base": metrics["base"]["value"],
            "saved": f"{found['saved_share']:.0%}",
            "regret": found["regret"]["regret"] if found["regret"] else None,
        }
        for name, found in metrics["methods"].items()
    ]
    about = ("method", "chosen", "batch_norm", "value", "defaults", "base")
    cost = ("trials", "discarded", "saved", "seconds", "regret")
    columns = {name: name for name in (*about, *cost)}
    columns |= {"value": record.config["metric"], "base": "base (scale 0)"}
    # Only a grid tries all that there is.
    columns |= {} if record.config["search"] == "grid" else {"regret": "regret among trials"}
    print_table(rows, columns)
    for name, found in metrics["methods"].items():
        if not found["space"]:
            print(f"{name!r} has nothing to search: it is scored as it comes.")
    if "spent" in metrics:
        print(_spent(metrics["spent"], metrics["regret"]))
    best = metrics["best"]
    print(
        f"Best: {best['method']}, {best['value']:.4f} as written, on the validation images that "
        "chose it: expect less on test images."
    )


def _spent(spent: Mapping[str, Any], regret: Mapping[str, Any] | None) -> str:
    """Return what a search to a budget cost, and what it missed where that is known."""
    line = (
        f"Spent: {spent['evaluations']:.1f} evaluations on {spent['trials']} trials, "
        f"{spent['seconds']:.0f} s."
    )
    return f"{line} Regret among those tried: {regret['regret']:.4f}." if regret else line
