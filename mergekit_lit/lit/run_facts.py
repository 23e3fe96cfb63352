"""This file is what a tracker, such as W&B, is told of a run: before it starts, and at its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mergekit_lit.core.experts import Base
from mergekit_lit.core.shards import model_files

LoggerKind = Literal["csv", "tensorboard", "wandb", "wandb-online"]
"""`csv`: files alone. `tensorboard`: event files too. `wandb`: W&B too, offline. `wandb-online`:
W&B too, over the network."""

ModelKind = Literal["base", "expert", "merged"]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is told of a run before it starts.

    Attributes:
        name: name of the run, such as the task.
        job: kind of the run: the stage, such as `train`, `merge` or `sweep`.
        group: runs that belong together, such as those of one sweep.
        tags: words to filter by; the job is one more.
        config: every setting.
    """

    name: str
    job: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrackedModel:
    """A model that a run made or used: a step of the way from base over experts to a merge.

    Attributes:
        name: what it is called; whoever makes it and whoever uses it call it the same.
        kind: what it is.
        files: what it consists of; none for a base, whose facts stand for it.
        facts: what is known of it.
    """

    name: str
    kind: ModelKind
    files: Sequence[Path] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is told of a run at its end.

    Attributes:
        summary: the final numbers.
        config: settings and facts that are known only now, such as the card.
        tables: tables of results by name; all rows of one have the same keys.
        used: models that the run started from.
        made: models that it made.
    """

    summary: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    used: Sequence[TrackedModel] = ()
    made: Sequence[TrackedModel] = ()


def base_model(base: Base) -> TrackedModel:
    """Return a base as what runs start from; its content hash tells it from others."""
    facts = {
        "name": base.name,
        "content": base.content,
        "backbone": base.backbone,
        "image_size": base.image_size,
    }
    return TrackedModel(name=base.name, kind="base", facts=facts)


def file_model(path: Path, kind: ModelKind, facts: Mapping[str, Any] | None = None) -> TrackedModel:
    """Return the model in a file, or in the shards that stand for it."""
    name = Path(path).name.partition(".safetensors")[0]
    return TrackedModel(name=name, kind=kind, files=model_files(Path(path)), facts=facts or {})
