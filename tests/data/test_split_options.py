"""The commands ask for the same images by the same flags, each in its own words."""

import dataclasses
import inspect

import pytest

from mergekit_lit.cli.calibration import calibration
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.suite_data import MergeDataModule

SHARED = ("n", "train_share", "val_share", "reserve", "split_seed", "size", "root", "download")


def offered(function):
    """Return type and default of each flag that chooses images."""
    parameters = inspect.signature(function).parameters
    return {name: (parameters[name].annotation, parameters[name].default) for name in SHARED}


@pytest.mark.parametrize("function", [MergeDataModule, calibration])
def test_every_command_takes_the_flags_of_train_with_their_defaults(function):
    assert offered(function) == offered(TaskDataModule)


def test_every_option_of_a_split_is_a_flag():
    flags = offered(TaskDataModule)
    for field in dataclasses.fields(SplitOptions):
        name = "split_seed" if field.name == "seed" else field.name
        assert flags[name][1] == field.default
