"""This file is the first stage: one task in, its expert files and record out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from mergekit_lit.callbacks.base_score import BaseScore
from mergekit_lit.callbacks.expert_export import ExpertExport
from mergekit_lit.callbacks.gradient_noise import GradientNoise
from mergekit_lit.callbacks.gradient_norm import GradientNorm
from mergekit_lit.callbacks.last_checkpoint import LastCheckpoint
from mergekit_lit.callbacks.path_length import PathLength
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.files import has_content, remove_unfinished
from mergekit_lit.core.records import Record, Stopwatch, plain
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.launch import check_world_size, trainer_arguments
from mergekit_lit.lit.loggers import log_failure, make_loggers
from mergekit_lit.lit.preemption import hold, preemptible, without_lightning
from mergekit_lit.lit.quiet import interruptible, quiet
from mergekit_lit.lit.run_facts import LoggerKind, RunFacts
from mergekit_lit.lit.sync import SyncedBatchNorm
from mergekit_lit.lit.tracking import check_logger
from mergekit_lit.stages.folders import check_folder, check_record
from mergekit_lit.stages.training_log import TrainingLog, log_experts

_DEFAULTS: Mapping[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}
_LOG_EVERY = 10

# What this stage decides itself, and the argument of `train_expert` that says it.
_TAKEN = {
    "max_steps": "steps",
    "max_epochs": "steps",
    "callbacks": "callbacks",
    "logger": "loggers",
    "enable_checkpointing": "checkpoint_every",
}

# Arguments of the module that do nothing without a teacher.
_TEACHING = ("teacher", "teacher_share", "temperature")
# Trainer arguments that change the weights' path: a resumed run must have the same ones.
_TRAJECTORY = (
    "accumulate_grad_batches",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "precision",
)
# Trainer arguments that say how many processes there are.
_PLACEMENT = ("accelerator", "devices", "num_nodes")


@dataclass(frozen=True)
class TrainResult:
    """What one run of training made.

    Attributes:
        experts: expert files, in the order of their step counts.
        record_path: the record's file.
        record: configuration, cards, seconds ...
    """

    experts: tuple[Path, ...]
    record_path: Path
    record: Record


# Each argument is one flag of the command line, hence so many.
@preemptible()
def train_expert(  # noqa: PLR0913
    *,
    data: TaskDataModule,
    model: ExpertModule,
    steps: Sequence[int],
    out: Path,
    trainer: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: LoggerKind | Sequence[Logger] = "csv",
    resume: bool = False,
    name: str | None = None,
    checkpoint_every: int = 200,
) -> TrainResult:
    """Fine-tune one expert and write its files.

    Writes `<out>/<name>.safetensors` (`<name>-step<K>.safetensors` for several K),
    `<name>.record.json`, `logs/<name>/metrics.csv` and `metrics.jsonl`, and while it runs
    `last.ckpt` and the one before, `previous.ckpt`, in `checkpoints/<name>`. A run that was killed
    goes on with `resume` and, on the CPU, ends with the same bytes. One that is told to end makes a
    checkpoint first, at the end of its step: SIGTERM gives the exit code 143; SIGUSR1 and SIGUSR2,
    by which a cluster announces that a job's time is over, give 75. A run that diverges keeps its
    logs, which show when and how, but leaves no expert of the steps from there on and no record.

    Args:
        data: the task.
        model: the base and how to tune it.
        steps: step counts K after which an expert is written; several only under a constant
            schedule, where they share one trajectory.
        out: folder of the run.
        trainer: arguments of Lightning's Trainer, such as `devices` or `gradient_clip_val`.
        callbacks: further callbacks, or the standard ones set up differently.
        loggers: `csv`, `tensorboard`, `wandb` (offline) or `wandb-online`, or loggers.
        resume: whether to go on from the last checkpoint, or the one before if that is damaged,
            or anew if both are; a finished run is left as it is.
        name: stem of the files; None for the task's name.
        checkpoint_every: steps between two checkpoints, of which one is made with each expert too,
            and where SIGTERM (exit code 143) or SIGUSR1 (75) tells the run to end; 0 for none.

    Raises:
        ValueError: an argument is out of range, or the run diverged.
        SystemExit: the process was told to end by a signal.
    """
    stopwatch = Stopwatch()
    name = name or data.task
    chosen = _checked_steps(steps, model)
    check_folder(Path(out))
    record_path = Path(out) / f"{name}.record.json"
    check_record(record_path, "train")
    if isinstance(loggers, str):
        check_logger(loggers)
    data.setup("fit")
    config = _config(data, model, chosen, trainer or {})
    last = LastCheckpoint(
        Path(out) / "checkpoints" / name / "last.ckpt",
        every=checkpoint_every,
        # So that no expert that is written is trained again.
        at=chosen,
        config=_path_config(config, model, chosen[-1]),
    )
    finished = _finished(record_path, config) if resume else None
    if finished:
        last.remove()
        return finished
    logs = Path(out) / "logs" / name
    export = ExpertExport(Path(out), steps=chosen, name=name)
    starting: list[Callback] = []
    if isinstance(loggers, str):
        starting = [TrainingLog(loggers, logs, config=config, resume=resume)]
        loggers = make_loggers("csv", logs, RunFacts(name=name))
    with quiet(), interruptible():
        observers = [last, *starting, *_standard(callbacks), *callbacks, export]
        fitter = _trainer(trainer or {}, chosen[-1], callbacks=observers, logger=loggers)
        if fitter.is_global_zero:
            _remove_unfinished(Path(out), name)
        checkpoint = last.find(tells=fitter.is_global_zero) if resume else None
        with _logs_told(fitter, logs):
            fitter.fit(model, datamodule=data, ckpt_path=checkpoint)
    if fitter.global_step < chosen[-1]:
        stopped = ValueError(
            f"Training must reach step {chosen[-1]}, but was stopped at step {fitter.global_step} "
            "by a time limit or a callback. Leave that out, or ask for fewer `steps`."
        )
        log_failure(fitter.loggers, stopped)
        raise stopped
    experts = tuple(export.path(data.task, step) for step in chosen)
    record = _record(name, config, data, model, experts)
    if fitter.is_global_zero:
        cards = {path.stem: load_expert(path).card.to_json() for path in experts}
        record.metrics = {"experts": cards}
        stopwatch.finish(record).write(record_path)
        last.remove()
        log_experts(fitter.loggers, model.base, {path: cards[path.stem] for path in experts})
    return TrainResult(experts, record_path, record)


@contextmanager
def _logs_told(trainer: Trainer, logs: Path) -> Iterator[None]:
    """Say in the error of a run that has begun, such as one that diverged, where its logs are."""
    try:
        yield
    except ValueError as error:
        if trainer.global_step == 0 or not logs.is_dir():
            raise
        raise ValueError(f"{error} Its curves up to there are in {str(logs)!r}.") from error


def _remove_unfinished(out: Path, name: str) -> None:
    """Remove what is left of files of this run that a killed process was writing."""
    for stem in (escape(name), f"{escape(name)}-step*"):
        for suffix in ("safetensors", "measured.json", "record.json"):
            remove_unfinished(out, f"{stem}.{suffix}")
        for twins in out.glob(f"{stem}.twins"):
            remove_unfinished(twins)
    remove_unfinished(out / "logs" / name)
    remove_unfinished(out / "checkpoints" / name)


def _checked_steps(steps: Sequence[int], model: ExpertModule) -> tuple[int, ...]:
    """Return the step counts in ascending order, each once."""
    chosen = tuple(sorted(set(steps)))
    if not chosen or chosen[0] < 1:
        raise ValueError(f"`steps` must be step counts of at least 1, but are {list(steps)!r}.")
    schedule = model.optimization.schedule
    if len(chosen) > 1 and model.optimization.horizon_matters:
        raise ValueError(
            f"`steps` must be one number under the {schedule!r} schedule, whose path depends on "
            f"its length, but are {list(chosen)!r}. Train once per length, or use the schedule "
            "'constant'."
        )
    return chosen


def _standard(given: Sequence[Callback]) -> list[Callback]:
    """Return the callbacks that every run has, without those that the user sets up differently."""
    standard: tuple[Callback, ...] = (BaseScore(), GradientNorm(), PathLength(), GradientNoise())
    return [one for one in standard if not any(isinstance(other, type(one)) for other in given)]


def _trainer(
    arguments: Mapping[str, Any], steps: int, *, callbacks: list[Callback], logger: Any
) -> Trainer:
    """Return the Trainer, in agreement with the launcher."""
    for taken in sorted(set(arguments) & set(_TAKEN)):
        raise ValueError(
            f"`trainer.{taken}` must be left out: `{_TAKEN[taken]}` says it. Remove it."
        )
    clip = arguments.get("gradient_clip_val")
    if clip is not None and not 0 < clip < float("inf"):
        raise ValueError(f"`trainer.gradient_clip_val` must be positive, but is {clip!r}.")
    defaults = {**_DEFAULTS, "log_every_n_steps": min(_LOG_EVERY, steps)}
    chosen = {**defaults, **trainer_arguments(arguments)}
    if chosen.pop("sync_batchnorm", False):
        plugins = chosen.get("plugins") or []
        chosen["plugins"] = [
            *(plugins if isinstance(plugins, list) else [plugins]),
            SyncedBatchNorm(),
        ]
    trainer = Trainer(
        **chosen,
        max_steps=steps,
        callbacks=callbacks,
        logger=list(logger),
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    check_world_size(trainer)
    without_lightning(trainer)
    if trainer.world_size > 1:
        # None may leave alone while the others wait for it.
        hold()
    return trainer


def world_size(arguments: Mapping[str, Any]) -> int:
    """Return how many processes a Trainer of these arguments would train in.

    Args:
        arguments: arguments of Lightning's Trainer, in agreement with the launcher.
    """
    placement = {name: arguments[name] for name in _PLACEMENT if name in arguments}
    with quiet():
        # Only Lightning knows what `auto` means here; a Trainer without a model starts nothing.
        trainer = Trainer(**_DEFAULTS, **placement, logger=False, enable_checkpointing=False)
    return trainer.world_size


def _config(
    data: TaskDataModule, model: ExpertModule, steps: Sequence[int], trainer: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what decides the weights' path, as plain values."""
    chosen = trainer_arguments(trainer)
    processes = world_size(chosen)
    return dict(
        plain(
            {
                "data": {**data.hparams, "split_hash": data.task_data.split_hash},
                "model": {**_model_config(model), "base_hash": model.base.content},
                "steps": list(steps),
                "trainer": {
                    **{key: chosen.get(key) for key in _TRAJECTORY},
                    # Each process sees its share of a batch, and by itself that share's statistics.
                    "world_size": processes,
                    "sync_batchnorm": processes > 1 and bool(chosen.get("sync_batchnorm")),
                },
            }
        )
    )


def _model_config(model: ExpertModule) -> dict[str, Any]:
    """Return the module's arguments, and what its teacher is; without one, nothing of teaching."""
    given = dict(model.hparams)
    if model.distillation is not None:
        return {**given, "teacher_hash": model.distillation.content}
    return {name: value for name, value in given.items() if name not in _TEACHING}


def _path_config(config: Mapping[str, Any], model: ExpertModule, steps: int) -> dict[str, Any]:
    """Return what a resumed run must keep: K only where the weights' path depends on it."""
    kept = {**config, "warmup": model.optimization.warmup(steps)}
    if not model.optimization.horizon_matters:
        del kept["steps"]
    return kept


def _finished(record_path: Path, config: Mapping[str, Any]) -> TrainResult | None:
    """Return the result of a run with the same configuration that has ended, if there is one."""
    if not record_path.is_file():
        return None
    record = Record.read(record_path)
    experts = tuple(record_path.parent / name for name in record.outputs)
    if record.config != config or not all(map(has_content, experts)):
        return None
    return TrainResult(experts, record_path, record)


def _record(
    name: str,
    config: Mapping[str, Any],
    data: TaskDataModule,
    model: ExpertModule,
    experts: Sequence[Path],
) -> Record:
    task = data.task_data
    return Record(
        stage="train",
        name=name,
        config=config,
        inputs={
            model.base.name: model.base.content,
            f"{task.suite}/{task.name}": task.split_hash,
        },
        seeds={
            "seed": model.seed,
            "split_seed": data.options.seed,
            "neighbour_seed": data.neighbour_seed,
        },
        outputs=[path.name for path in experts],
    )
