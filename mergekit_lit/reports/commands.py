"""This file writes the command that makes a record again, from its resolved configuration."""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mergekit_lit.core.records import Record, plain

# The split's seed has another name on the command line, where `seed` is the training's.
_RENAMED = {"seed": "split_seed"}
_HASHES = ("split_hash", "base_hash")
_DEVICES = {"world_size": "devices"}
# Any other flag is null by default; parameters of methods may be either.
_NULL_IS_A_CHOICE = ("discard",)


def command_line(record: Record, *, out: str = "FOLDER") -> str:
    """Return a command line that makes the record again, quoted for a shell.

    Args:
        record: of any stage; a stage that is not known is written flag by flag.
        out: the folder to write to, where the record does not know it.
    """
    write = _STAGES.get(record.stage, _plain_words)
    return shlex.join(["mergekit-lit", record.stage, *write(record, out)])


def _train_words(record: Record, out: str) -> list[str]:
    kept = {
        group: {_DEVICES.get(k, k): value for k, value in values.items() if k not in _HASHES}
        for group, values in record.config.items()
        if isinstance(values, Mapping)
    }
    return [*_flags(kept), *_flags({"steps": record.config.get("steps"), "out": out})]


def _merge_words(record: Record, _: str) -> list[str]:
    config = record.config
    recipe = dict(config["recipe"])
    own, veneers = recipe.pop("config"), recipe.pop("veneers", ())
    flags = {
        "out": record.outputs[0] if record.outputs else None,
        **{name: value for name, value in recipe.items() if name not in own},
        "then": veneers,
        **{name: config.get(name) for name in ("base", "heads", "max_shard_bytes")},
        "allow_different_base": config.get("allow_different_base") or None,
        "callbacks": config.get("observers"),
    }
    given = {name: value for name, value in flags.items() if value not in ([], ())}
    experts = map(str, config["experts"])
    return [*experts, *_flags(given), *_flags(own, null=True), *_data_flags(config)]


def _bound_words(record: Record, out: str) -> list[str]:
    config = record.config
    recipe = {k: v for k, v in config["recipe"].items() if k not in ("dtype", "out_dtype")}
    own, veneers = recipe.pop("config"), recipe.pop("veneers", ())
    flags = {**recipe, "then": veneers, "base": config.get("base"), "out": out}
    given = {name: value for name, value in flags.items() if value not in ([], ())}
    rest = {"refits": config.get("refits") or None, "effort": config["effort"]}
    experts = map(str, config["experts"])
    words = [*experts, *_flags(given), *_flags(own, null=True), *_data_flags(config)]
    return [*words, *_flags(rest)]


def _predict_words(record: Record, out: str) -> list[str]:
    config = record.config
    recipes = config.get("recipes", [])  # none where bases are compared
    flags: dict[str, Any] = {}
    if recipes:
        names = ",".join(recipe["method"] for recipe in recipes)
        flags = {"method": names, "then": recipes[0]["veneers"], "seed": recipes[0]["seed"]}
    flags |= {name: config.get(name) for name in ("table", "level", "base")} | {"out": out}
    given = {name: value for name, value in flags.items() if value not in ([], ())}
    own = recipes[0]["config"] if len(recipes) == 1 else {}
    experts = map(str, config["experts"])
    return [*experts, *_flags(given), *_flags(own, null=True), *_data_flags(config)]


def _recommend_words(record: Record, out: str) -> list[str]:
    request = dict(record.config["request"])
    suite = str(request.pop("suite"))
    return [suite, *_flags(request), *_flags({"space": record.config["space"], "out": out})]


def _data_flags(config: Mapping[str, Any]) -> list[str]:
    """Return the flags of the images that a merge looks at."""
    calibration = config.get("calibration") or {}
    data = {name: value for name, value in calibration.items() if name != "options"}
    options = calibration.get("options", {})
    data |= {_RENAMED.get(name, name): value for name, value in options.items()}
    return _flags({"data": data})


def _evaluate_words(record: Record, out: str) -> list[str]:
    apart = ("models", "batch_norm", "trainer")
    data = {name: value for name, value in record.config.items() if name not in apart}
    rest = {name: record.config.get(name) for name in ("batch_norm", "trainer")}
    seed = {"seed": record.seeds.get("intervals")}
    models = [str(model) for model in record.config.get("models", ())]
    return [*models, *_flags({"data": data, **rest, **seed, "out": out, "name": record.name})]


def _sweep_words(record: Record, out: str) -> list[str]:
    # The file that a sweep leaves says all of it, flags included.
    return [f"{record.config.get('out', out)}/{record.outputs[0]}"]


def _plain_words(record: Record, _: str) -> list[str]:
    return _flags(record.config)


_STAGES: Mapping[str, Callable[[Record, str], list[str]]] = {
    "train": _train_words,
    "merge": _merge_words,
    "bound": _bound_words,
    "predict": _predict_words,
    "recommend": _recommend_words,
    "evaluate": _evaluate_words,
    "sweep": _sweep_words,
}


def _flags(config: Mapping[str, Any], *, null: bool = False) -> list[str]:
    """Return `--name value` for every leaf, but for nulls that only repeat a flag's default."""
    return [
        word
        for name, value in _leaves(config)
        if value is not None or null or name in _NULL_IS_A_CHOICE
        for word in (f"--{name}", _text(value))
    ]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(plain(value))
