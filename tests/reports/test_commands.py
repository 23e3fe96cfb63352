import shlex

from mergekit_lit.core.records import Record
from mergekit_lit.reports.commands import command_line


def test_training_leaves_hashes_and_nulls_out():
    config = {
        "data": {"suite": "tiny", "task": "a", "n": None, "split_hash": "123"},
        "model": {"lr": 0.1, "betas": [0.9, 0.99], "base_hash": "456"},
        "steps": [5, 10],
        "trainer": {"precision": None, "world_size": 2},
    }
    line = command_line(Record(stage="train", name="a", config=config), out="runs/x y")
    assert line == (
        "mergekit-lit train --data.suite tiny --data.task a --model.lr 0.1 "
        "--model.betas '[0.9, 0.99]' --trainer.devices 2 --steps '[5, 10]' --out 'runs/x y'"
    )


def test_merging_names_files_method_and_split():
    config = {
        "experts": ["a.safetensors", "b.safetensors"],
        "recipe": {
            "method": "ties",
            "config": {"scale": 0.5, "weights": None},
            "batch_norm": "recalibrate",
            "seed": 3,
        },
        "calibration": {
            "suite": "tiny",
            "root": None,
            "images": 64,
            "options": {"val_share": 0.2, "seed": 7},
        },
        "base": "resnet",
    }
    record = Record(stage="merge", name="ties", config=config, outputs=["ties.safetensors"])
    assert shlex.split(command_line(record))[2:] == [
        *("a.safetensors", "b.safetensors", "--out", "ties.safetensors", "--method", "ties"),
        *("--batch_norm", "recalibrate", "--seed", "3", "--base", "resnet", "--scale", "0.5"),
        *("--weights", "null"),
        *("--data.suite", "tiny", "--data.images", "64"),
        *("--data.val_share", "0.2", "--data.split_seed", "7"),
    ]


def test_tuning_keeps_a_null_that_is_a_choice():
    config = {"method": ["ties"], "trials": None, "discard": None, "space": {"scale": [1]}}
    assert command_line(Record(stage="tune", name="ties", config=config)) == (
        "mergekit-lit tune --method '[\"ties\"]' --discard null --space.scale '[1]'"
    )


def test_evaluation_names_models_and_data():
    config = {
        "models": ["resnet", "a.safetensors"],
        "suite": "tiny",
        "tasks": ["a"],
        "split": "val",
        "root": None,
        "batch_norm": "stored",
        "trainer": {"devices": 2},
    }
    record = Record(stage="evaluate", name="x", config=config, seeds={"intervals": 4})
    assert command_line(record) == (
        "mergekit-lit evaluate resnet a.safetensors --data.suite tiny --data.tasks '[\"a\"]' "
        "--data.split val --batch_norm stored --trainer.devices 2 --seed 4 --out FOLDER --name x"
    )


def test_other_stages_are_written_flag_by_flag():
    record = Record(stage="quickstart", name="x", config={"backbone": "vit", "lr": None, "jobs": 2})
    assert command_line(record) == "mergekit-lit quickstart --backbone vit --jobs 2"


def test_a_sweep_is_made_again_from_its_file():
    config = {"axes": {"model.lr": [0.1]}, "out": "runs/rates", "job": "train"}
    record = Record(stage="sweep", name="rates", config=config, outputs=["sweep.yaml"])
    assert command_line(record) == "mergekit-lit sweep runs/rates/sweep.yaml"
