"""Tests of what the experiments' commands refuse: in one line, with exit code 2."""

import sys

import pytest

from mergekit_lit.theory.effort import Effort


@pytest.fixture(scope="module")
def inputs(experiment):
    return experiment("inputs")


def test_wrong_input_is_one_line_and_exit_code_2(inputs, monkeypatch, capsys):
    def main():
        raise KeyError("No suite named 'x'.\nKnown: y.")

    monkeypatch.setattr(sys, "argv", ["experiments/one.py"])
    assert inputs.command(main) == 2
    assert capsys.readouterr().err == "one.py: error: No suite named 'x'. Known: y.\n"
    monkeypatch.setenv("MERGEKIT_LIT_TRACEBACK", "1")
    with pytest.raises(KeyError):
        inputs.command(main)
    assert inputs.command(lambda: None) == 0


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("lr: 0.1", ValueError, "must give `steps`, a list of whole numbers"),
        ("lrr: 0.1", KeyError, "No key of .* named 'lrr'. Did you mean 'lr'"),
        ("{lr: 0.1, steps: 0}", ValueError, "`steps` of .* must be a list of .* but is 0"),
        ("{lr: 0.1, steps: [4, 2]}", ValueError, "each above the one before, but is"),
        ("{lr: fast, steps: [2]}", ValueError, "`lr` of .* must be a positive number"),
        ("{lr: true, steps: [2]}", ValueError, "`lr` of .* must be a positive number"),
        ("- 1", ValueError, "must be a mapping with lr, steps"),
        ("{lr: [", ValueError, "must be a YAML file"),
    ],
)
def test_a_file_says_what_it_may(inputs, tmp_path, text, error, told):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(error, match=told):
        inputs.read_settings(path, {"lr": inputs.NUMBER, "steps": inputs.STEPS})


def test_flags_stand_in_for_what_a_file_says(inputs, tmp_path):
    path = tmp_path / "file.yaml"
    kinds = {"lr": inputs.NUMBER, "suite": inputs.WORD}
    with pytest.raises(FileNotFoundError, match="No file"):
        inputs.read_settings(path, kinds)
    path.write_text("lr: 1e-3")
    found = inputs.read_settings(path, kinds, optional=("suite",), suite="mine", lr=None)
    assert found == {"lr": 0.001, "suite": "mine"}


def test_names_are_known_or_refused(inputs):
    assert inputs.named("backbone", None, {"vit": 1, "resnet": 2}) == ["vit", "resnet"]
    with pytest.raises(KeyError, match=r"No backbone named 'vitt'. Did you mean 'vit'"):
        inputs.named("backbone", ["vitt"], ["vit", "resnet"])
    with pytest.raises(KeyError, match=r"No key of `effort` named 'image'. Did you mean 'images'"):
        inputs.built("`effort`", Effort, {"image": 3})


def test_seeds_given_come_after_those_of_the_file(inputs):
    assert inputs.seeds_with({"seeds": [0, 2]}, [1, 0]) == [0, 2, 1]
    with pytest.raises(ValueError, match="whole numbers of at least 0"):
        inputs.seeds_with({"seeds": [0]}, [-1])
