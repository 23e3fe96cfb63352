"""This file is `mergekit-lit recommend`: how to train experts that merge well, before training.

Of experts that are there, `--experts` tells what will make them merge badly, and what mends it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_group, add_parameters, command_parser, instantiated, parse
from mergekit_lit.core.records import Record
from mergekit_lit.lit.run_facts import LoggerKind
from mergekit_lit.search.recommending.recommend import Recommendation, recommend
from mergekit_lit.search.recommending.request import Request
from mergekit_lit.search.recommending.space import Space
from mergekit_lit.stages.advice import base_cautions, expert_cautions, uncarded

_USAGE = "SUITE --budget SECONDS --out FOLDER [options], or --experts EXPERT ..."
_EXPERTS = "--experts"
_SHOWN = 10


def options(*, out: Path, logger: LoggerKind = "csv", json: bool = False) -> None:
    """Say where the answer goes.

    Args:
        out: folder of `recommended.yaml` (for `train`), `recommend.record.json`, `report.html`, and
            what was trained on the way. The same command goes on where a killed one stopped.
        logger: `csv` (the files alone), `tensorboard`, `wandb` (offline) or `wandb-online`: one run
            with every candidate and measured merge.
        json: whether to print the record as JSON, and nothing else.
    """


def advice(experts: list[Path], *, json: bool = False) -> None:
    """Tell of experts that are there what will make them merge badly, and what mends it.

    Args:
        experts: their files.
        json: whether to print the lines as JSON.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    if any(word.partition("=")[0] == _EXPERTS for word in argv):
        return _advise([word.removeprefix(f"{_EXPERTS}=") for word in argv if word != _EXPERTS])
    parser = _parser()
    made = instantiated(parser, parse(parser, argv, positional="suite"))
    given = dict(vars(made))
    out, json = given.pop("out"), given.pop("json")
    space, logger = given.pop("space"), given.pop("logger")

    def tell(text: str) -> None:
        if not json:
            print(text, file=sys.stderr, flush=True)

    found = recommend(Request(**given), out=out, space=space, logger=logger, tell=tell)
    if json:
        print_json(vars(found.record))
    else:
        _print(found)
    return 0


def _advise(argv: Sequence[str]) -> int:
    """Tell of experts that are there; they follow `--experts`."""
    parser = command_parser("recommend", COMMANDS["recommend"], usage=_USAGE)
    add_parameters(parser, advice)
    made = instantiated(parser, parse(parser, argv, positional="experts"))
    lines = base_cautions(made.experts) + expert_cautions(made.experts)
    unknown = uncarded(made.experts)
    if made.json:
        print_json(lines + unknown)
    else:
        clear = [] if unknown else ["Nothing on their cards speaks against merging these experts."]
        print("\n".join([*(lines or clear), *unknown]))
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser("recommend", COMMANDS["recommend"], usage=_USAGE)
    parser.add_class_arguments(Request)
    add_parameters(parser, options)
    add_group(parser, Space, "space")
    return parser


def _print(found: Recommendation) -> None:
    """Print what to do, what to expect, why, and what it cost."""
    metrics = found.record.metrics
    columns = {name: name for name in ("optimizer", "lr", "batch", "share", "steps")}
    columns |= {"val_loss": "val loss", "measured": "measured", "progress": "progress"}
    columns |= {"noise": "noise", "generalization": "generalization", "travel": "travel"}
    print_table(metrics["candidates"][:_SHOWN], columns)
    _print_costs(found.record)
    for line in metrics["cautions"]:
        print(f"! {line}")
    chosen, expected = metrics["recommended"], metrics["expected"]
    print(
        f"Recommended: {', '.join(f'{name} {value}' for name, value in chosen.items())}. Expected "
        f"mean accuracy {expected['accuracy']:.3f} [{expected['low']:.3f}, {expected['high']:.3f}] "
        f"over {expected['tasks']} tasks, beside the base's {expected['base']:.3f}."
    )
    done = ", ".join(metrics["experts"])
    print(f"To train: mergekit-lit train --config {found.training}. Why: {found.page}")
    print(f"Experts of {done} are trained so already: {', '.join(metrics['experts'].values())}")


def _print_costs(record: Record) -> None:
    budget = record.metrics["budget"]
    parts = ("probes", "validation run", "training")
    told = ", ".join(f"{name} {budget[name]:,.0f}" for name in parts)
    print(f"Of {budget['limit']:,.0f} {budget['unit']}: {told}.")
