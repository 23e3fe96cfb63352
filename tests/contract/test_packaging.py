"""The wheel holds the tree, the layers hold, and names are sorted and whole."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mergekit_lit"


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts]


@pytest.mark.slow
def test_wheel_holds_every_module_and_data_file(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mergekit_lit/")}
    tree = {
        str(path.relative_to(source))
        for folder in (source / "mergekit_lit", source / "mergekit_lit" / "callbacks")
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert tree - held == set()


def test_importing_the_package_imports_no_torch():
    code = "import sys, mergekit_lit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_exported_names_are_sorted_and_exist():
    for path in PACKAGE.glob("*/__init__.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                names = ast.literal_eval(node.value)
                assert names == sorted(names), path


def test_no_module_is_long():
    long = {p.name: n for p in modules() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
