"""This file says which runs belong together, and what of a stage's results a tracker is told.

A run in `<sweep>/runs/<name>` is one of a sweep, whoever started it: its group is the sweep's
folder, and the values of the sweep's axes are among its settings.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_lit.core.expert_files import file_kind
from mergekit_lit.lit.run_facts import RunFacts, TrackedModel, file_model
from mergekit_lit.stages.folders import SWEEP_FILE

_CONFIG = "config.yaml"


def facts_of_run(
    job: str, name: str, out: Path, *, tags: Sequence[str], config: Mapping[str, Any]
) -> RunFacts:
    """Return what is told of a run of a stage before it starts.

    Args:
        job: the stage.
        name: what it makes, such as an expert of a task.
        out: folder of what it makes.
        tags: words to filter by, such as suite and backbone.
        config: its settings.
    """
    sweep = sweep_of(out)
    if sweep is None:
        return RunFacts(name=name, job=job, group=out.resolve().name, tags=tags, config=config)
    point = _point(sweep, config, out)
    values = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())
    return RunFacts(
        name=f"{name} {values}".strip(),
        job=job,
        group=sweep.name,
        tags=[*tags, sweep.name],
        config={**config, "axes": point},
    )


def sweep_of(out: Path) -> Path | None:
    """Return the folder of the sweep that a run's folder is in, if it is in one."""
    folder = out.resolve()
    sweep = folder.parent.parent
    return sweep if folder.parent.name == "runs" and (sweep / SWEEP_FILE).is_file() else None


def used_files(inputs: Mapping[str, str]) -> list[TrackedModel]:
    """Return the experts and merged models among what a run read, by their files.

    Args:
        inputs: content hash by path, as records have it; what names no model of ours is left out.
    """
    kinds = {given: file_kind(Path(given)) for given in inputs if Path(given).is_file()}
    return [
        file_model(Path(given), "expert" if kind == "expert" else "merged", {"content": content})
        for given, content in inputs.items()
        if (kind := kinds.get(given)) in ("expert", "merged")
    ]


def _point(sweep: Path, config: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return the values of the sweep's axes in one of its runs: of its settings, or its file."""
    axes = _read(sweep / SWEEP_FILE).get("axes") or {}
    keys = (key for block in (axes if isinstance(axes, list) else [axes]) for key in block)
    saved = _read(out / _CONFIG)
    found = {key: _at(config, key, _at(saved, key)) for key in dict.fromkeys(keys)}
    return {key: value for key, value in found.items() if value is not None}


def _at(config: Any, key: str, otherwise: Any = None) -> Any:
    """Return the value at a dotted key."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return otherwise if config is None else config


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
