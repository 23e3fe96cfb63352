import pytest
from lightning.pytorch import Trainer

from mergekit_lit.lit.launch import check_world_size, trainer_arguments

TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
FABRIC = {**TORCHRUN, "LT_CLI_USED": "1", "LT_DEVICES": "2", "LT_NUM_NODES": "1"}
SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3"}


def test_without_a_launcher_nothing_changes():
    assert trainer_arguments({"devices": 3, "precision": "64"}, {}) == {
        "devices": 3,
        "precision": "64",
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, {"devices": 2, "num_nodes": 1}),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, {"devices": 4, "num_nodes": 2}),
        (SLURM, {"devices": 4, "num_nodes": 2}),
        (FABRIC, {"devices": 2, "num_nodes": 1}),
        ({**FABRIC, "LT_DEVICES": "0,3"}, {"devices": "0,3", "num_nodes": 1}),
        (
            {**FABRIC, "LT_STRATEGY": "ddp", "LT_ACCELERATOR": "cpu", "LT_PRECISION": "64-true"},
            {
                "devices": 2,
                "num_nodes": 1,
                "strategy": "ddp",
                "accelerator": "cpu",
                "precision": "64-true",
            },
        ),
        # Lightning's own children: it sets no LOCAL_WORLD_SIZE, and knows its devices itself.
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {}),
    ],
)
def test_the_launcher_fills_what_is_not_given(environment, expected):
    assert trainer_arguments({}, environment) == expected
    assert trainer_arguments({"devices": "auto"}, environment) == {"devices": "auto"} | expected


@pytest.mark.parametrize("devices", [2, "2", "0,1", [0, 1]])
def test_explicit_devices_that_agree_are_kept(devices):
    assert trainer_arguments({"devices": devices}, FABRIC)["devices"] == devices


@pytest.mark.parametrize(
    ("explicit", "environment"),
    [
        ({"devices": 1}, FABRIC),
        ({"devices": 4}, TORCHRUN),
        ({"devices": [0]}, TORCHRUN),
        ({"num_nodes": 2}, TORCHRUN),
        ({"precision": "32-true"}, {**FABRIC, "LT_PRECISION": "64-true"}),
        ({"strategy": "fsdp"}, {**FABRIC, "LT_STRATEGY": "ddp"}),
    ],
)
def test_explicit_arguments_that_contradict_the_launcher_are_refused(explicit, environment):
    with pytest.raises(ValueError, match="must agree with the launcher") as caught:
        trainer_arguments(explicit, environment)
    assert "\n" not in str(caught.value)


def test_a_variant_of_the_launcher_s_strategy_is_no_contradiction():
    environment = {**FABRIC, "LT_STRATEGY": "ddp"}
    variant = "ddp_find_unused_parameters_true"
    assert trainer_arguments({"strategy": variant}, environment)["strategy"] == variant


@pytest.mark.parametrize("shell", ["bash", "interactive"])
def test_the_shell_of_an_interactive_job_is_no_launcher(shell):
    environment = {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    environment["SLURM_JOB_NAME"] = shell
    assert trainer_arguments({"devices": 2}, environment) == {"devices": 2}
    # Lightning would not see the others: each would start a training of its own.
    with pytest.raises(ValueError, match=f"8 tasks must not be named '{shell}'"):
        trainer_arguments({}, {**SLURM, "SLURM_JOB_NAME": shell})


def test_two_silent_trainings_are_refused():
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    check_world_size(trainer, {})
    check_world_size(trainer, {"WORLD_SIZE": "1"})
    for environment in (TORCHRUN, SLURM):
        with pytest.raises(ValueError, match="separate trainings would run"):
            check_world_size(trainer, environment)
