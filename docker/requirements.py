"""This file prints what the image installs before the package: its requirements and some extras.

python docker/requirements.py pyproject.toml ray slurm > requirements.txt
"""

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path


def requirements(pyproject: Path, extras: Sequence[str]) -> list[str]:
    """Return the requirements of a project and of some of its extras, each once.

    Raises:
        KeyError: the project has no such extra.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    found = [*project["dependencies"], *(each for extra in extras for each in optional[extra])]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    sys.stdout.writelines(f"{each}\n" for each in requirements(Path(sys.argv[1]), sys.argv[2:]))
