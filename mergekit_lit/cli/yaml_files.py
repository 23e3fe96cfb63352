"""This file reads YAML files of parameters."""

from pathlib import Path
from typing import Any

import yaml


def load_yaml(path: str) -> dict[str, Any]:
    """Read one file of parameters, interpolations as they stand.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML mapping, or gives a key twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No file {path!r}.")
    try:
        # A safe loader, but for what it refuses.
        value = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path!r} must be a YAML file, but is not: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path!r} must be a YAML mapping, but is a {type(value).__name__}.")
    return value


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML drops the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                problem = f"the key {key.value!r} comes twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node
