import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from jsonargparse import ArgumentParser, Namespace

from mergekit_lit.cli.parsing import add_parameters, command_parser, parse, value_of, values_of
from mergekit_lit.cli.saving import config_texts, write_config
from mergekit_lit.cli.yaml_files import load_yaml


@dataclass
class Data:
    """Where images come from.

    Args:
        suite: the suite.
        task: the task.
        n: how many.
    """

    suite: str = "embedded8"
    task: str = "mnist"
    n: int | None = None


class Watch:
    def __init__(self, every: int = 1) -> None:
        self.every = every


class Machine:
    def __init__(self, *, devices: int | str | list[int] = "auto", clip: float | None = None):
        self.devices, self.clip = devices, clip


def train(
    files: list[Path],
    *,
    out: str = "runs/x",
    scale: float = 0.3,
    steps: list[int] | None = None,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    watch: list[Watch] | None = None,
    resume: bool = False,
    max_scale: float = 1.0,
) -> None:
    """Train.

    Args:
        files: what to read.
        scale: length of the step.
    """


@pytest.fixture
def parser() -> ArgumentParser:
    parser = command_parser("train", "Train.")
    parser.add_class_arguments(Data, "data")
    parser.add_class_arguments(Machine, "trainer")
    add_parameters(parser, train)
    return parser


@pytest.fixture
def read(parser):
    def read_words(*words: str) -> Namespace:
        return parse(parser, words, positional="files")

    return read_words


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_flags_win_over_files_whatever_their_order(read, tmp_path):
    config = write(tmp_path / "a.yaml", "scale: 0.5\ndata: {task: fashion, n: 7}\nfiles: [x]\n")
    given = read("a", "b", "--scale", "0.7", "--data.n=9", "--config", config)
    assert given.scale == 0.7
    assert given.data.n == 9
    assert given.data.task == "fashion"
    assert given.files == [Path("a"), Path("b")]
    assert read("--config", config).files == [Path("x")]


def test_later_files_win_and_interpolations_see_the_final_values(read, tmp_path):
    first = write(tmp_path / "a.yaml", "data: {task: fashion}\nout: runs/${data.task}-${scale}\n")
    second = write(tmp_path / "b.yaml", "scale: 0.25\n")
    given = read("f", f"--config={first}", "--config", second, "--data.task", "letters")
    assert given.out == "runs/letters-0.25"


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (("--steps", "100,200"), "steps", [100, 200]),
        (("--steps", "100"), "steps", [100]),
        (("--steps=[1, 2]", "--steps+=3"), "steps", [1, 2, 3]),
        (("--resume",), "resume", True),
        (("--resume", "--scale", "1"), "resume", True),
        (("--resume", "false"), "resume", False),
        (("scale=0.125",), "scale", 0.125),
        (("--scale", "-1e-3"), "scale", -0.001),
        (("--trainer.devices", "2"), "trainer.devices", 2),
        (("--trainer.devices", "0,1"), "trainer.devices", "0,1"),
        (("--files=*.x,re:a{1,2}",), "files", [Path("*.x"), Path("re:a{1,2}")]),
        (("--max-scale", "2"), "max_scale", 2.0),
        (("max-scale=2",), "max_scale", 2.0),
    ],
)
def test_words_become_values(read, words, key, expected):
    assert read("file", *words)[key] == expected


@pytest.mark.parametrize(
    ("text", "steps"), [("100", [100]), ("1,2", [1, 2]), ("[1, 2]", [1, 2]), ("null", None)]
)
def test_one_value_in_a_file_is_a_list_too(read, tmp_path, text, steps):
    config = write(tmp_path / "a.yaml", f"steps: {text}\nfiles: x\nout: s-${{data.task}}\n")
    given = read("--config", config, "--data.task", "letters")
    assert (given.steps, given.files, given.out) == (steps, [Path("x")], "s-letters")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("out", "4072932893982468", "4072932893982468"),
        ("out", "2024-01-01", "2024-01-01"),
        ("out", "a: b: c", "a: b: c"),
        ("data.task", "true", "true"),
        ("trainer.devices", "2", 2),
        ("trainer.devices", "0,1", "0,1"),
        ("data.n", "7", 7),
        ("data.n", "null", None),
        ("steps", "[1, 2]", [1, 2]),
        ("resume", None, True),
    ],
)
def test_a_flag_is_what_a_file_would_hold(parser, key, text, value):
    assert value_of(parser, key, text) == value


def test_what_an_anchor_gives_may_be_given_anew(tmp_path):
    path = write(tmp_path / "a.yaml", "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert load_yaml(path)["b"] == {"x": 3, "y": 2}


def test_classes_are_named_by_path(read, parser):
    path = f"{__name__}.Watch"
    given = read(
        "f", f"--watch+={path}", "--watch+", f"{{class_path: {path}, init_args: {{every: 5}}}}"
    )
    assert [watch.every for watch in parser.instantiate(given).watch] == [1, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scal", "1"), "No parameter named 'scal'. Did you mean 'scale'?"),
        (("--data.tsk", "1"), "No parameter named 'data.tsk'. Did you mean 'data.task'?"),
        (("--devices=2",), "Did you mean 'trainer.devices'?"),
        (("--trainer.max_steps=2",), "Did you mean 'steps'?"),
        (("--max-scal", "1"), "Did you mean 'max_scale'?"),
        (("--zzzzzz",), "No parameter named 'zzzzzz'. All of them: mergekit-lit train --help"),
        (("--scale", "nan"), "`scale` must be a finite number, but is 'nan'."),
        (("--scale", "much"), "`scale` must be a finite number, but is 'much'."),
        (("--data.n", "x"), "`data.n` must be a whole number or null, but is 'x'."),
        (("--steps", "1,x"), "`steps` must be "),
        (("--optimizer", "sdg"), "Did you mean 'sgd'?"),
        (("--scale",), "`scale` must be followed by a value"),
        (("--watch+=nowhere.Watch",), "nowhere.Watch: No module named 'nowhere'"),
        (("--config", "missing.yaml"), "No file 'missing.yaml'."),
    ],
)
def test_wrong_flags_are_told_in_one_line(read, words, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read("file", *words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scal: 1\n", "a.yaml: No parameter named 'scal'. Did you mean 'scale'?"),
        ("data: {tsk: 1}\n", "a.yaml: No parameter named 'data.tsk'. Did you mean 'data.task'?"),
        ("data: {n: many}\n", "`data.n` must be a whole number or null, but is 'many'."),
        ("- 1\n", "must be a YAML mapping, but is a list"),
        ("a: [1\n", "must be a YAML file, but is not"),
        ("data: {n: 1}\nscale: 1\ndata: {n: 2}\n", "not: the key 'data' comes twice"),
        ("data: {n: 1, n: 2}\n", "the key 'n' comes twice"),
        ("out: ${data.nothing}\n", "nothing"),
    ],
)
def test_wrong_files_are_told(read, tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read("file", "--config", write(tmp_path / "a.yaml", text))


def test_a_missing_parameter_is_named(read):
    with pytest.raises(ValueError, match="`files` must be given"):
        read("--scale", "1")


def test_arguments_that_nobody_asked_for_are_refused(parser):
    with pytest.raises(ValueError, match="'file' is none"):
        parse(parser, ["file"])


def test_a_first_pass_finds_values_without_a_parser():
    words = ["a", "--method", "ties", "--config=x.yaml", "method=dare", "--other", "method"]
    assert values_of(words, "method") == ["ties", "dare"]
    assert values_of(words, "config") == ["x.yaml"]


def test_saved_configs_keep_interpolations_and_run_again(parser, read, tmp_path):
    config = write(tmp_path / "a.yaml", "data: {task: fashion, n: 3}\nout: runs/${data.task}\n")
    words = ["one", "two", "--config", config, "--data.n", "4", "--resume"]
    given = read(*words)
    write_config(config_texts(parser, words, given, positional="files"), tmp_path / "config")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    resolved = yaml.safe_load((tmp_path / "config.resolved.yaml").read_text())
    assert written["out"] == "runs/${data.task}"
    assert resolved["out"] == "runs/fashion"
    assert {**written, "out": ""} == {**resolved, "out": ""}
    assert written["files"] == ["one", "two"]
    assert vars(read("--config", str(tmp_path / "config.resolved.yaml"))) == vars(given)
    assert vars(read("--config", str(tmp_path / "config.yaml"))) == vars(given)
    again = read("--config", str(tmp_path / "config.yaml"), "--data.task", "letters")
    assert again.out == "runs/letters"


def test_an_overridden_interpolation_is_saved_as_it_was_overridden(parser, read, tmp_path):
    config = write(tmp_path / "a.yaml", "out: runs/${data.task}\n")
    words = ["f", "--config", config, "--out", "here"]
    texts = config_texts(parser, words, read(*words))
    assert yaml.safe_load(texts[".yaml"])["out"] == "here"
