"""This file recommends how to train experts: probes, an outlook on all candidates, validation.

Every part leaves a file, and a run that was killed goes on with the first that is missing. Nothing
is decided by a clock, but for the pace of a budget in seconds, which is measured once and kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_lit.core.files import read_json, write_json, write_text
from mergekit_lit.core.locks import sole_writer
from mergekit_lit.core.records import Record, Stopwatch, plain
from mergekit_lit.core.seeds import generator
from mergekit_lit.lit.run_facts import LoggerKind, Outcome
from mergekit_lit.lit.tracking import check_logger, log_run
from mergekit_lit.search.recommending.budget import IN_STEPS, Budget, Pace, Parts, Shares
from mergekit_lit.search.recommending.confirming import Confirmation, Confirmed, Log
from mergekit_lit.search.recommending.expecting import Share, expected_accuracy
from mergekit_lit.search.recommending.pacing import clock, measured_pace
from mergekit_lit.search.recommending.page import recommendation_page
from mergekit_lit.search.recommending.points import Probed
from mergekit_lit.search.recommending.probes import probe, probe_points
from mergekit_lit.search.recommending.request import Request, checked
from mergekit_lit.search.recommending.site import Setting, Site, Train
from mergekit_lit.search.recommending.space import Space, Way
from mergekit_lit.search.recommending.telling import facts_of, tables_of, training_file
from mergekit_lit.stages.folders import check_folder, check_record
from mergekit_lit.stages.run_groups import facts_of_run
from mergekit_lit.theory.effort import Effort

RECORD = "recommend.record.json"
TRAINING = "recommended.yaml"
PAGE = "report.html"


@dataclass(frozen=True)
class Recommendation:
    """What came of it.

    Attributes:
        record: everything, with the terms of every candidate.
        training: the YAML that `mergekit-lit train` takes.
        page: the page.
    """

    record: Record
    training: Path
    page: Path


def recommend(
    request: Request,
    *,
    out: Path,
    space: Space | None = None,
    effort: Effort | None = None,
    train: Train | None = None,
    logger: LoggerKind = "csv",
    tell: Callable[[str], None] = lambda _: None,
) -> Recommendation:
    """Recommend how to train experts of a suite's tasks, so that their merge does well.

    Writes `recommend.record.json`, `recommended.yaml` and `report.html`, and on the way
    `pace.json`, `probes.json`, `points.json` and the experts in `experts/`. Test images are never
    looked at. The same request in the same folder goes on where a killed one stopped.

    Args:
        request: what is asked for.
        out: folder.
        space: of candidates; the default space by default.
        effort: how many images the constants of the bound take.
        train: trains in place of `train_expert`.
        logger: `csv` (the files alone), `tensorboard`, `wandb` (offline) or `wandb-online`: one run
            with every candidate and measured merge.
        tell: is told what is being done.

    Raises:
        KeyError: unknown suite, task, backbone or method.
        ValueError: an argument out of range, too small a budget, a task without validation images,
            or a folder of another request.
    """
    watch, space = Stopwatch(), space or Space()
    out, effort = Path(out), effort or Effort(micro_batches=4, hessian_images=32)
    setting = checked(request, space)
    check_folder(out)
    check_record(out / RECORD, "recommend")
    check_logger(logger)
    # Loads the base: before anything is written, since there may be none of this name.
    site = Site(setting, out / "experts", train=train)
    plan = plain({"request": asdict(request), "space": asdict(space), "effort": asdict(effort)})
    with sole_writer(out / ".recommend.lock"):
        kept = Kept(out, plan)
        if request.budget is not None:
            tell("what a step takes")
        pace = Pace(**kept.part("pace", lambda: _paced(request, setting)))
        budget = _budget(request, setting, pace)
        found = _found(request, site, budget, kept, effort, tell)
        record = Record(
            stage="recommend",
            name=out.resolve().name,
            config=plan,
            seeds={"seed": request.seed},
            metrics=plain({**found, "seconds": kept.seconds}),
            outputs=[TRAINING, PAGE],
        )
        watch.finish(record)
        write_text(out / TRAINING, training_file(setting, record.metrics, out))
        write_text(out / PAGE, recommendation_page(record))
        record.write(out / RECORD)
        told = facts_of_run(
            record.stage,
            record.name,
            out,
            tags=[request.suite, request.backbone],
            config=record.config,
        )
        outcome = Outcome(summary=record.metrics, tables=tables_of(record.metrics))
        log_run(logger, out / "logs" / "recommend", told, outcome, once=True)
    return Recommendation(record, out / TRAINING, out / PAGE)


def _paced(request: Request, setting: Setting) -> dict[str, Any]:
    """Return the pace, if the budget is large enough at it."""
    pace = IN_STEPS if request.budget is None else measured_pace(setting)
    _budget(request, setting, pace).parts(request.limit)
    return asdict(pace)


def _budget(request: Request, setting: Setting, pace: Pace) -> Budget:
    return Budget(
        space=setting.space,
        tasks=len(setting.tasks),
        sample=min(request.sample, len(setting.tasks)),
        ways=request.ways,
        shares=Shares(probe=request.probe_share, confirm=request.confirm_share),
        pace=pace,
    )


def _found(
    request: Request,
    site: Site,
    budget: Budget,
    kept: "Kept",
    effort: Effort,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Return what probes, outlook and validation run found."""
    parts, tasks = budget.parts(request.limit), site.setting.tasks
    order = torch.randperm(len(tasks), generator=generator(request.seed, "sample")).tolist()
    sample = tuple(tasks[place] for place in sorted(order[: parts.sample]))
    steps = asked_steps(site.setting.space, parts)
    tell(f"probes of {parts.length} steps on {', '.join(sample)}")
    probed = Probed.from_json(
        kept.part("probes", lambda: probe(site, sample, steps, parts.length, effort).to_json())
    )
    tell("validation run")
    confirmation = Confirmation(site, sample, budget, parts, steps, Log(kept.out / "points.json"))
    by_accuracy = request.aim == "accuracy"

    def confirm() -> Confirmed:
        return confirmation.run(probed.constants, probed.points, by_accuracy=by_accuracy)

    # Its merges are kept one by one: only what they took is a part of its own.
    kept.part("confirm", lambda: {"measured": len(confirm().points)})
    confirmed = confirm()
    base = {task: Share(s.accuracy, s.images) for task, s in probed.constants.base.items()}
    if request.head != "trained":
        others = [task for task in tasks if task not in base]
        tell("the base on the other tasks")
        shares = kept.part("base", lambda: {t: asdict(site.base_share(t)) for t in others})
        base |= {task: Share(**share) for task, share in shares.items()}
    merged = {t: Share(s.accuracy, s.images) for t, s in confirmed.chosen.scores.items()}
    expected = expected_accuracy(base, merged)
    way, k = confirmed.chosen.way, confirmed.chosen.steps
    experts = {task: str(site.train(way, task, steps[way], k)[k]) for task in sample}
    return {**facts_of(budget, request.limit, probed, confirmed, expected), "experts": experts}


def asked_steps(space: Space, parts: Parts) -> dict[Way, tuple[int, ...]]:
    """Return for each way all step counts that its trajectory may ever be asked for."""
    probes = set(space.probes)
    return {
        way: tuple(
            sorted(
                {c.steps for c in parts.candidates if c.way == way}
                | (set(probe_points(parts.length)) if way in probes else set())
            )
        )
        for way in {*probes, *(c.way for c in parts.candidates)}
    }


class Kept:
    """The parts of a recommendation that are finished, a file each, with what they took."""

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        """Begin, or go on with the same plan.

        Raises:
            ValueError: the folder holds another one.
        """
        self.out = out
        self.seconds: dict[str, float] = {}
        path = out / "plan.json"
        if path.is_file() and read_json(path) != plan:
            raise ValueError(
                f"`out` must be a new folder or that of this very request, but {str(out)!r} holds "
                "another one. Choose another folder."
            )
        self._plan = plan

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part as it was kept, or make it."""
        path = self.out / f"{name}.json"
        if path.is_file():
            value = read_json(path)
        else:
            now = clock()
            begun = now()
            found = make()
            value = {"seconds": round(now() - begun, 3), "found": plain(found)}
            write_json(self.out / "plan.json", self._plan)
            write_json(path, value)
        self.seconds[name] = value["seconds"]
        return value["found"]
