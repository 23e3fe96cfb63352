"""The flags of Lightning's Trainer: what is given counts, even where it is Lightning's default."""

import pytest
import yaml

from mergekit_lit.cli import main
from mergekit_lit.cli.parsing import command_parser, parse
from mergekit_lit.cli.saving import config_texts
from mergekit_lit.cli.trainer import add_trainer, explicit


@pytest.fixture
def parser():
    made = command_parser("evaluate", "")
    add_trainer(made)
    return made


def test_what_is_not_given_is_lightning_s_to_choose(parser):
    assert explicit(vars(parse(parser, []).trainer)) == ({}, [])


def test_a_value_that_is_lightning_s_default_is_given(parser):
    words = ["--trainer.devices=auto", "--trainer.num_nodes=1", "--trainer.deterministic=false"]
    namespace = parse(parser, words)
    expected = {"devices": "auto", "num_nodes": 1, "deterministic": False}
    assert explicit(vars(namespace.trainer)) == (expected, [])


def test_a_saved_configuration_says_the_same_again(parser, tmp_path):
    words = ["--trainer.devices=auto"]
    text = config_texts(parser, words, parse(parser, words))[".yaml"]
    assert yaml.safe_load(text)["trainer"]["accelerator"] is None
    (tmp_path / "run.yaml").write_text(text)
    again = parse(parser, ["--config", str(tmp_path / "run.yaml")])
    assert explicit(vars(again.trainer)) == ({"devices": "auto"}, [])


def test_help_tells_lightning_s_default(parser):
    told = " ".join(parser.format_help().split())
    assert "Lightning's default: 'auto'" in told


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("twins=0", "`twins` must be at least 1, but is 0."),
        ("replaced=16", "`trainer.callbacks.replaced` must be an argument of the class"),
        ("twin=3", "`trainer.callbacks.twin` must be an argument of the class"),
    ],
)
def test_arguments_of_a_callback_are_refused_in_one_line(tmp_path, capsys, argument, message):
    words = ["--data.task", "mnist", "--model.base", "vit@random:0", "--steps", "1"]
    words += ["--trainer.callbacks+=mergekit_lit.callbacks.StabilityTwins"]
    words += [f"--trainer.callbacks.{argument}", "--out", str(tmp_path / "out")]
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 300
    assert not (tmp_path / "out").exists()
