import csv
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from lightning.pytorch import Callback

from mergekit_lit.callbacks.gradient_norm import GradientNorm
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.files import file_hash
from mergekit_lit.core.records import Record
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.stages.train import train_expert, world_size

RESNET, VIT = "timm/test_resnet@random:0", "vit@random:0"


class EarlyEnd(Callback):
    """Ends a run as early stopping and time limits do."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step


def train(suite, out, *, base=VIT, steps=(4,), data=None, trainer=None, model=None, **options):
    module = ExpertModule(
        base,
        **{"image_size": 8, "lr": 0.01, "schedule": "constant", "warmup_steps": 1, **(model or {})},
    )
    return train_expert(
        data=TaskDataModule(suite, "dots", **{"batch": 12, "reserve": 8, **(data or {})}),
        model=module,
        steps=list(steps),
        out=out,
        trainer={"accelerator": "cpu", **(trainer or {})},
        **options,
    )


def read(path):
    return path.read_text().splitlines()


def test_writes_expert_record_and_logs(tiny_suite, tmp_path, capfd):
    result = train(tiny_suite, tmp_path, steps=[20])
    assert result.experts == (tmp_path / "dots.safetensors",)
    card = load_expert(result.experts[0]).card
    assert (card.steps, card.schedule, card.schedule_steps) == (20, "constant", None)
    assert card.travel > 0
    assert card.path_length >= card.displacement > 0
    record = Record.read(tmp_path / "dots.record.json")
    assert record == result.record
    assert record.outputs == ["dots.safetensors"]
    assert record.config["model"]["lr"] == 0.01
    assert record.metrics["experts"]["dots"]["val_accuracy"] == card.val_accuracy
    rows = [json.loads(line) for line in read(tmp_path / "logs/dots/metrics.jsonl")]
    assert {"train/loss", "train/lr", "gradient/norm"} <= set().union(*rows)
    assert len(list(csv.DictReader(read(tmp_path / "logs/dots/metrics.csv")))) == len(rows)
    assert not (tmp_path / "checkpoints").exists()
    assert capfd.readouterr() == ("", "")


def test_fine_tuning_learns(tiny_suite, tmp_path):
    result = train(tiny_suite, tmp_path, steps=[30], model={"optimizer": "adamw", "lr": 3e-3})
    assert load_expert(result.experts[0]).card.train_accuracy > 0.9


def test_the_same_run_gives_the_same_bytes(tiny_suite, tmp_path):
    files = [train(tiny_suite, tmp_path / name, base=RESNET).experts[0] for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_several_step_counts_share_one_trajectory(tiny_suite, tmp_path):
    result = train(tiny_suite, tmp_path / "all", steps=[6, 2, 4])
    assert [path.name for path in result.experts] == [
        f"dots-step{k}.safetensors" for k in (2, 4, 6)
    ]
    alone = train(tiny_suite, tmp_path / "alone", steps=[4])
    assert file_hash(result.experts[1]) == file_hash(alone.experts[0])


@pytest.mark.parametrize(
    ("options", "accumulate"), [({"base": RESNET}, 2), ({"model": {"optimizer": "adamw"}}, 1)]
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny_suite, tmp_path, options, accumulate, stop_after
):
    options = {**options, "steps": [3, 7], "trainer": {"accumulate_grad_batches": accumulate}}
    options["data"] = {"augment": "crop-flip"}
    whole = train(tiny_suite, tmp_path / "whole", **options)
    with pytest.raises(stop_after.error):
        train(
            tiny_suite, tmp_path / "cut", checkpoint_every=2, callbacks=[stop_after(5)], **options
        )
    assert (tmp_path / "cut/checkpoints/dots/last.ckpt").is_file()
    gone_on = train(tiny_suite, tmp_path / "cut", checkpoint_every=2, resume=True, **options)
    assert [file_hash(path) for path in gone_on.experts] == [file_hash(p) for p in whole.experts]
    logs = [(tmp_path / name / "logs/dots/metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_an_expert_that_is_written_is_not_trained_again(tiny_suite, tmp_path, stop_after):
    class Count(Callback):
        steps = 0

        def on_train_batch_end(self, *_):
            self.steps += 1

    with pytest.raises(stop_after.error):
        train(tiny_suite, tmp_path, steps=[3, 6], callbacks=[stop_after(5)])
    count = Count()
    train(tiny_suite, tmp_path, steps=[3, 6], callbacks=[count], resume=True)
    assert count.steps == 3


def test_a_run_that_diverges_keeps_its_logs_and_says_where(tiny_suite, tmp_path):
    told = f"The loss must be finite, .* Its curves up to there are in '{tmp_path}/logs/dots'."
    with pytest.raises(ValueError, match=told) as caught:
        train(
            tiny_suite, tmp_path, steps=[20], model={"lr": 1e30}, trainer={"log_every_n_steps": 2}
        )
    assert "\n" not in str(caught.value)
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert kept == ["logs/dots/metrics.csv", "logs/dots/metrics.jsonl"]


def test_resume_leaves_a_finished_run_as_it_is(tiny_suite, tmp_path):
    first = train(tiny_suite, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = train(tiny_suite, tmp_path, resume=True)
    assert again.record == first.record
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_resume_refuses_another_configuration(tiny_suite, tmp_path, stop_after):
    with pytest.raises(stop_after.error):
        train(tiny_suite, tmp_path, checkpoint_every=2, callbacks=[stop_after(3)])
    with pytest.raises(
        ValueError, match=r"configuration, but `model\.lr` was 0\.01 and is 0\.02 now"
    ):
        train(tiny_suite, tmp_path, model={"lr": 0.02}, resume=True)


@pytest.mark.parametrize(
    ("now", "key", "was", "value"),
    [
        ({"devices": 2}, "world_size", "1", "2"),
        ({"devices": 2, "sync_batchnorm": True}, "sync_batchnorm", "False", "True"),
        ({"precision": "bf16-true"}, "precision", "None", "'bf16-true'"),
    ],
)
def test_resume_refuses_other_processes_and_precision(
    tiny_suite, tmp_path, now, key, was, value, stop_after
):
    with pytest.raises(stop_after.error):
        train(tiny_suite, tmp_path, checkpoint_every=2, callbacks=[stop_after(3)])
    with pytest.raises(ValueError, match=rf"`trainer\.{key}` was {was} and is {value} now"):
        train(tiny_suite, tmp_path, trainer=now, resume=True)


def test_processes_are_counted_without_starting_any():
    pair = {"accelerator": "cpu", "devices": 2}
    assert world_size(pair) == 2
    assert world_size({**pair, "devices": "auto"}) == world_size({"num_nodes": 1}) == 1


def test_resume_begins_anew_where_no_checkpoint_is_whole(tiny_suite, tmp_path, caplog):
    path = tmp_path / "cut/checkpoints/dots/last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK\x03\x04 cut short")
    result = train(tiny_suite, tmp_path / "cut", resume=True)
    (told,) = caplog.messages
    assert "last.ckpt' is damaged" in told
    assert told.endswith("The run begins anew, since no checkpoint serves it.")
    whole = train(tiny_suite, tmp_path / "whole")
    assert file_hash(result.experts[0]) == file_hash(whole.experts[0])
    assert not path.parent.parent.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": []}, r"`steps` must be step counts of at least 1, but are \[\]"),
        ({"steps": [0, 5]}, r"`steps` must be step counts of at least 1, but are \[0, 5\]"),
        (
            {"steps": [4, 8], "model": {"schedule": "cosine"}},
            "`steps` must be one number under the 'cosine' schedule",
        ),
        ({"steps": [1]}, "`warmup_steps` must be less than the number of steps 1, but is 1"),
        ({"trainer": {"max_steps": 3}}, r"`trainer.max_steps` must be left out: `steps` says it"),
        ({"data": {"batch": 0}}, "`batch` must be at least 1, but is 0"),
        ({"data": {"n": 1}}, "`n` must lie in"),
        ({"data": {"neighbour": 9}}, r"`neighbour` must lie in 0\.\.8"),
        (
            {"trainer": {"gradient_clip_val": -1.0}},
            "gradient_clip_val` must be positive, but is -1",
        ),
        (
            {"steps": [4], "callbacks": [EarlyEnd(2)]},
            "must reach step 4, but was stopped at step 2",
        ),
        ({"checkpoint_every": -1}, "`checkpoint_every` must be at least 0, but is -1"),
        ({"loggers": "wanbd"}, "No logger named 'wanbd'. Did you mean 'wandb'"),
        ({"model": {"lr": 1e38}}, "must (be finite|hold finite numbers)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_suite, tmp_path, options, message):
    with pytest.raises((ValueError, KeyError), match=message) as caught:
        train(tiny_suite, tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.json"))


class Refusal(Callback):
    """Refuses a run as late as an optimizer does, when Lightning has opened its loggers."""

    def on_fit_start(self, *_):
        raise ValueError("Refused.")


@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": [Refusal()]},
        {"model": {"warmup_steps": 9}},
        {"model": {"sam_radius": 0.1}, "trainer": {"accumulate_grad_batches": 2}},
    ],
)
def test_a_refused_run_leaves_no_wandb_run(tiny_suite, tmp_path, options):
    with pytest.raises(ValueError, match=r"Refused|must be"):
        train(tiny_suite, tmp_path, loggers="wandb", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_batch_is_told_before_a_default_warm_up(tiny_suite, tmp_path):
    options = {"data": {"batch": 0}, "steps": [3], "model": {"warmup_steps": None}}
    with pytest.raises(ValueError, match="`batch` must be at least 1, but is 0"):
        train(tiny_suite, tmp_path, **options)


def test_a_card_tells_the_warm_up_that_few_steps_left(tiny_suite, tmp_path):
    result = train(tiny_suite, tmp_path, steps=[2], model={"warmup_steps": None})
    assert load_expert(result.experts[0]).card.warmup_steps == 1


def test_a_standard_callback_can_be_set_up_differently(tiny_suite, tmp_path):
    train(tiny_suite, tmp_path, callbacks=[GradientNorm(per_parameter=True)], steps=[10])
    rows = [json.loads(line) for line in read(tmp_path / "logs/dots/metrics.jsonl")]
    assert any(name.endswith("qkv.weight") for row in rows for name in row)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions_make_float32_experts(tiny_suite, tmp_path, precision):
    # torch 2.14 makes NaN of bfloat16 convolutions that end in one pixel, on some processors.
    model = {"image_size": 32}
    result = train(
        tiny_suite, tmp_path, base="resnet@random:0", model=model, trainer={"precision": precision}
    )
    expert = load_expert(result.experts[0])
    assert expert.card.precision == precision
    assert {t.dtype for t in expert.backbone.values() if t.is_floating_point()} == {torch.float32}
    assert expert.card.train_loss > 0


def test_a_neighbour_differs_and_says_so(tiny_suite, tmp_path):
    plain = train(tiny_suite, tmp_path / "plain")
    other = train(tiny_suite, tmp_path / "other", data={"neighbour": 4, "neighbour_seed": 1})
    card = load_expert(other.experts[0]).card
    assert (card.replaced, card.neighbour_seed) == (4, 1)
    assert card.split_hash != load_expert(plain.experts[0]).card.split_hash


SCRIPT = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from mergekit_lit.lit.data import TaskDataModule
    from mergekit_lit.lit.expert import ExpertModule
    from mergekit_lit.stages.train import train_expert
    from lightning.pytorch import Callback
    import os, signal, threading


    class Die(Callback):
        # Kills this process a few milliseconds after a step has begun.
        def __init__(self, step, seconds):
            self.step, self.seconds = step, seconds

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == self.step:
                kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
                threading.Timer(self.seconds, kill).start()


    suite, out, base, norm, options = sys.argv[1:]
    trainer = {"accelerator": "cpu", **eval(options)}
    schedule = trainer.pop("schedule", "cosine")
    steps = trainer.pop("steps", [20])
    every = trainer.pop("every", 3)
    resume = trainer.pop("resume", False)
    die = trainer.pop("die", None)
    train_expert(
        data=TaskDataModule(suite, "dots", batch=12, reserve=8),
        model=ExpertModule(
            base, image_size=8, lr=0.002, warmup_steps=1, norm_statistics=norm, schedule=schedule
        ),
        steps=steps,
        out=Path(out),
        trainer=trainer,
        callbacks=[Die(*die)] if die else [],
        resume=resume,
        checkpoint_every=every,
    )
    """
)


def command(suite, out, *, base=RESNET, norm="train", **options):
    (out.parent / "script.py").write_text(SCRIPT)
    script = str(out.parent / "script.py")
    return [sys.executable, script, suite, str(out), base, norm, repr(options)]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tiny_suite, tmp_path):
    steps = [120]
    subprocess.run(command(tiny_suite, tmp_path / "whole", steps=steps), check=True)
    cut = tmp_path / "cut"
    # Somewhere in a step, or in the writing of a checkpoint.
    die = (60, 0.005 * (os.getpid() % 10))
    run = subprocess.run(command(tiny_suite, cut, steps=steps, die=die), check=False)
    assert run.returncode == -signal.SIGKILL
    assert (cut / "checkpoints/dots/last.ckpt").exists()
    assert not (cut / "dots.safetensors").exists()
    subprocess.run(command(tiny_suite, cut, steps=steps, resume=True), check=True)
    whole = (tmp_path / "whole/dots.safetensors").read_bytes()
    assert (cut / "dots.safetensors").read_bytes() == whole
    assert not list(cut.rglob(".*"))


@pytest.mark.slow
def test_a_run_killed_after_its_first_expert_goes_on_from_there(tiny_suite, tmp_path):
    """Several K of one trajectory: the same bytes, and no more work than was left and lost."""
    told = {"steps": [100, 200, 300], "schedule": "constant", "every": 10, "log_every_n_steps": 1}
    subprocess.run(command(tiny_suite, tmp_path / "whole", **told), check=True)
    cut = tmp_path / "cut"
    run = subprocess.run(command(tiny_suite, cut, **told, die=(207, 0.01)), check=False)
    assert run.returncode == -signal.SIGKILL
    first = cut / "dots-step100.safetensors"
    assert first.exists()
    assert not (cut / "dots-step300.safetensors").exists()
    before = first.stat().st_mtime_ns
    subprocess.run(command(tiny_suite, cut, **told, resume=True), check=True)
    assert first.stat().st_mtime_ns == before
    for name in ("dots-step100", "dots-step200", "dots-step300"):
        whole = (tmp_path / "whole" / f"{name}.safetensors").read_bytes()
        assert (cut / f"{name}.safetensors").read_bytes() == whole
    seconds = [Record.read(tmp_path / n / "dots.record.json").cpu_seconds for n in ("cut", "whole")]
    # 90 to 100 steps of 300, and what every run does at its start and end.
    assert seconds[0] < 0.8 * seconds[1]
    assert not list(cut.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "sync"), [("frozen", False), ("train", True)])
def test_two_processes_train_the_same_expert(tiny_suite, tmp_path, norm, sync):
    pair = {"devices": 2, "strategy": "ddp", "sync_batchnorm": sync}
    subprocess.run(command(tiny_suite, tmp_path / "one", norm=norm), check=True)
    subprocess.run(command(tiny_suite, tmp_path / "two", norm=norm, **pair), check=True)
    one = load_expert(tmp_path / "one/dots.safetensors")
    two = load_expert(tmp_path / "two/dots.safetensors")
    # Sums run in another order; a larger rate would let that rounding grow beyond 1e-4.
    for name, tensor in one.backbone.items():
        if tensor.is_floating_point():
            assert (two.backbone[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
    assert two.card.batch == one.card.batch
    assert two.card.train_loss == pytest.approx(one.card.train_loss, rel=1e-4)
