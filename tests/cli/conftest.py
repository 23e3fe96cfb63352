"""What tests of sweeps by the command share: a file, and timm loaded before the clock runs."""

import pytest
import yaml

from mergekit_lit.models.backbones import load_base

BASE = "vit@random:0"


@pytest.fixture
def told_in_one_line(monkeypatch):
    """Errors of input are told as users see them."""
    monkeypatch.delenv("MERGEKIT_LIT_TRACEBACK", raising=False)


@pytest.fixture(scope="module")
def libraries():
    """Loads timm before the clock of the first test runs."""
    load_base(BASE, image_size=8)


@pytest.fixture
def sweep_file(tiny_suite, tmp_path):
    """Writes a sweep over the tiny suite and returns its file."""

    def write(axes, *, job="train", name="sweep.yaml", **more) -> str:
        whole = {
            "job": job,
            "out": str(tmp_path / "out"),
            "jobs": 1,
            "data": {"suite": tiny_suite, "reserve": 4},
            "axes": axes,
        }
        if job == "train":
            whole |= {"steps": 2}
            whole |= {"model": {"base": BASE, "image_size": 8, "schedule": "constant"}}
        whole |= more
        path = tmp_path / name
        path.write_text(yaml.safe_dump(whole))
        return str(path)

    return write
