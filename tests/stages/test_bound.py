"""The bound of real tiny experts: what is measured is what a direct computation gives."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from torch.nn.functional import cross_entropy

from mergekit_lit.callbacks import StabilityTwins
from mergekit_lit.cli import main
from mergekit_lit.core.calibration import Batch
from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import load_expert, load_merged, save_expert
from mergekit_lit.core.measurements import add_measurements, read_measurements
from mergekit_lit.core.params import flat
from mergekit_lit.core.records import Record
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.merging.engine import merge
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.models.backbones import load_base
from mergekit_lit.models.heads import apply_head
from mergekit_lit.stages.bound import bound_files
from mergekit_lit.stages.bound_facts import expert_facts, is_recalibrated
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.merge import merge_files
from mergekit_lit.stages.opening import load_base_of
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.stages.train import train_expert
from mergekit_lit.theory.bound import TOTAL
from mergekit_lit.theory.constants import measure_point
from mergekit_lit.theory.effort import Effort
from mergekit_lit.theory.facts import ALL
from mergekit_lit.theory.objective import Objective, hessian_product
from mergekit_lit.theory.smoothness import measure_sample_gradients

VIT = "vit@random:0"
# All 100 training images of a task: the estimates are then exact.
WHOLE = Effort(micro_batches=5, batch=20)
LITTLE = Effort(micro_batches=3, batch=4, hessian_images=4, lanczos_steps=2)


@pytest.fixture(scope="module")
def experts(tiny_suite, tmp_path_factory):
    """Experts of two tasks; twins of the first alone were carried."""
    out = tmp_path_factory.mktemp("bound")
    files = []
    for task in ("dots", "stripes"):
        result = train_expert(
            data=TaskDataModule(tiny_suite, task, batch=10, reserve=8),
            model=ExpertModule(VIT, image_size=8, lr=20.0, warmup_steps=1, schedule="constant"),
            steps=[12],
            out=out,
            trainer={"accelerator": "cpu"},
            callbacks=[
                StabilityTwins(twins=1, replaced=[1, 4], null=False, rounding=False, export=True)
            ],
        )
        files.extend(result.experts)
    return files


@pytest.fixture(scope="module")
def opened(experts, tiny_suite):
    """Experts, calibration on their training images, and objectives at the base."""
    backbone, base = load_base_of(experts)
    gathered = in_memory(load_experts(experts, base=base))
    where = Calibration(suite=tiny_suite, options=SplitOptions(reserve=8))
    images = {task.name: task.train for task in where.tasks(gathered.names)}
    calibration = calibration_on(images, gathered, backbone=backbone, split="train")
    names = gathered.merged_names()
    fixed = {name: t for name, t in gathered.base.items() if name not in names}
    objectives = [Objective(task, calibration, fixed) for task in gathered.names]
    return gathered, calibration, objectives, {name: gathered.base[name] for name in names}


def direct_gradients(opened):
    """The gradient of each task over all its images, in one pass."""
    _, calibration, objectives, weights = opened
    rows = []
    for objective in objectives:
        samples = calibration.samples[objective.task]
        rows.append(objective.gradient(weights, samples.take(torch.arange(len(samples)))).double())
    return rows


def test_gradients_over_all_images_are_exact(opened):
    _, calibration, objectives, weights = opened
    names = list(weights)
    blocks = {"first": names[:5], "rest": names[5:]}
    found = measure_point(
        objectives, weights, calibration, p=[0.5, 0.5], effort=WHOLE, blocks=blocks
    )
    one, two = direct_gradients(opened)
    mean = (one + two) / 2
    assert found.gradient2.value == pytest.approx(float(mean.square().sum()), rel=1e-4)
    size = sum(weights[name].numel() for name in names[:5])
    for block, part in (("first", slice(0, size)), ("rest", slice(size, None))):
        rows = torch.stack([one[part], two[part]])
        gram = torch.tensor(found.gram[block], dtype=torch.float64)
        torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-3, atol=1e-8)
    total = sum(torch.tensor(gram).sum() for gram in found.gram.values()) / 4
    assert float(total) == pytest.approx(found.gradient2.value, rel=1e-6)
    expected = float((one - mean).square().sum())
    assert found.zeta2["dots"].value == pytest.approx(expected, rel=1e-4)
    samples = calibration.samples["dots"]
    batch = samples.take(torch.arange(100))
    features = calibration.expert.features({**objectives[0].fixed, **weights}, batch.inputs)
    loss = cross_entropy(calibration.logits("dots", features), batch.labels)
    assert found.losses["dots"] == pytest.approx(float(loss), rel=1e-5)


def test_gradients_of_samples_and_second_derivatives_are_those_of_autograd(opened):
    gathered, calibration, objectives, weights = opened
    batch = calibration.samples["dots"].take(torch.arange(6))
    one = objectives[0]
    squares = one.squared_gradients(weights, batch)
    for i in range(6):
        alone = calibration.samples["dots"].take(torch.tensor([i]))
        expected = float(one.gradient(weights, alone).double().square().sum())
        assert float(squares[i]) == pytest.approx(expected, rel=1e-3)
    batches = {o.task: _wide(calibration.samples[o.task], 8) for o in objectives}
    heads = dict(zip(gathered.names, gathered.heads, strict=True))
    wide = dataclasses.replace(
        calibration,
        logits=lambda task, f: apply_head({n: t.double() for n, t in heads[task].items()}, f),
    )
    objectives = [dataclasses.replace(o, calibration=wide) for o in objectives]
    there = {name: gathered.tuned[0][name].double() for name in weights}
    sizes = [t.numel() for t in there.values()]
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(sum(sizes), generator=draw, dtype=torch.float64)

    def gradient(scale):
        parts = torch.split(scale * direction, sizes)
        moved = {
            name: t + part.view_as(t) for (name, t), part in zip(there.items(), parts, strict=True)
        }
        return torch.stack([o.gradient(moved, batches[o.task]) for o in objectives]).mean(0)

    expected = (gradient(1e-6) - gradient(-1e-6)) / 2e-6
    found = hessian_product(objectives, batches, there)(direction)
    assert float((found - expected).norm()) < 1e-4 * float(expected.norm())


def _wide(samples, count):
    batch = samples.take(torch.arange(count))
    return Batch(batch.inputs.double(), batch.labels)


def test_squared_gradients_of_all_tasks_are_averaged(opened):
    _, calibration, objectives, weights = opened
    found = measure_sample_gradients(
        objectives, weights, calibration, p=[0.5, 0.5], effort=Effort(hessian_images=8)
    )
    assert found.samples == 16
    assert found.low < found.value < found.high


def test_all_terms_of_a_merge_are_told(experts, tiny_suite, tmp_path):
    where = Calibration(suite=tiny_suite, options=SplitOptions(reserve=8))
    record = bound_files(experts, calibration=where, effort=LITTLE, out=tmp_path / "bound.json")
    told = record.metrics["bound"]
    values = {name: term["value"] for name, term in told["terms"].items()}
    assert told["total"] == pytest.approx(sum(values[name] for name in TOTAL))
    assert values["delta2"] > 0
    assert values["delta2_by_path"] > 0
    assert told["weighing"]["chi2_lambda"] == 0
    rows = {row["task"]: row for row in record.metrics["experts"]}
    assert set(rows) == {"dots", "stripes"}
    assert rows["dots"]["gap"] == rows["dots"]["test_loss"] - rows["dots"]["train_loss"]
    card = load_expert(experts[0]).card
    assert rows["dots"]["travel"] == card.travel
    assert Record.read(tmp_path / "bound.json").metrics["bound"]["total"] == told["total"]


def test_what_the_step_bounds_is_measured_along_it(experts, opened, tiny_suite):
    gathered, _, _, weights = opened
    where = Calibration(suite=tiny_suite, options=SplitOptions(reserve=8))
    effort = dataclasses.replace(WHOLE, hessian_images=4, lanczos_steps=1)
    metrics = bound_files(experts, calibration=where, effort=effort).metrics
    ends = [{name: params[name] for name in weights} for params in gathered.tuned]
    step = flat({name: (ends[0][name] + ends[1][name]) / 2 - weights[name] for name in weights})
    step2 = float(step.double().square().sum())
    constants, terms = metrics["constants"], metrics["bound"]["terms"]
    assert constants["step2"][ALL] == pytest.approx(step2, rel=1e-4)
    smooth = constants["smoothness"]["secant"]["value"]
    for row, gradient in zip(metrics["experts"], direct_gradients(opened), strict=True):
        slope = float(gradient @ step.double())
        measured = constants["base"]["slopes"][row["task"]]
        assert measured["value"] == pytest.approx(slope, rel=1e-3)
        assert measured["low"] < slope < measured["high"]
        descent = row["base_loss"] + slope + smooth / 2 * step2
        assert row["descent"] == pytest.approx(descent, rel=1e-5)
        own = constants["merged"]["own_gradient2"][row["task"]]["value"]
        assert row["merged_gradient2"] == own
    eps2 = [load_expert(path).card.eps_path ** 2 for path in experts]
    by_path = terms["delta2_by_path"]["value"]
    assert by_path == pytest.approx(sum(eps2) / 2 * 0.25, rel=1e-6, abs=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["base", "recalibrate-per-task"])
def test_base_and_merge_are_looked_at_under_the_same_statistics(tiny_suite, tmp_path, batch_norm):
    result = [
        train_expert(
            data=TaskDataModule(tiny_suite, task, batch=10, reserve=8),
            model=ExpertModule("resnet", lr=0.003, warmup_steps=1, schedule="constant"),
            steps=[5],
            out=tmp_path,
            trainer={"accelerator": "cpu"},
        ).experts[0]
        for task in ("dots", "stripes")
    ]
    where = Calibration(suite=tiny_suite, options=SplitOptions(reserve=8), images=64)
    effort = Effort(micro_batches=4, batch=16, hessian_images=16, lanczos_steps=1)
    recipe = Recipe(batch_norm=batch_norm)
    metrics = bound_files(result, recipe=recipe, calibration=where, effort=effort).metrics
    told = " ".join(metrics["bound"]["violated"])
    assert ("BatchNorm statistics" in told) == (batch_norm != "base")
    constants, rows = metrics["constants"], metrics["experts"]
    assert constants["base"]["losses"] != constants["base_losses"]
    reached = sum(row["train_loss"] for row in rows) / 2
    assert reached <= metrics["bound"]["terms"]["descent"]["value"]


def test_a_trained_head_s_stability_counts():
    far = {"above_rounding": True, "backbone": {"mean": 0.2}, "head": {"mean": 0.3}}
    twins = {"replaced": {"16": far | {"head": {"mean": 0.5}}, "1": far}}
    facts = expert_facts(Card(task="a", head="trained"), "a", None, twins)
    assert (facts.eps2, facts.eps2_head, facts.trained_head) == (0.2, 0.3, True)
    assert not facts.unchecked
    alone = expert_facts(Card(), "a", None, {"replaced": {"1": far | {"above_rounding": None}}})
    assert (alone.eps2, alone.unchecked) == (0.2, True)
    assert expert_facts(Card(task="a", head="trained"), "a", None, None).eps2_head is None
    assert expert_facts(Card(task="a", head="frozen-ncm"), "a", None, None).eps2_head == 0.0


def test_what_an_expert_descended_beside_the_cross_entropy_is_told():
    plain = Card(
        task="a", weight_decay=0.0, label_smoothing=0.0, finetuning="full", head="frozen-ncm"
    )
    facts = expert_facts(plain, "a", None, None)
    assert (facts.own_objective, facts.clipped, facts.trained_head) == ("", False, False)
    other = dataclasses.replace(plain, weight_decay=0.1, sam_radius=0.05, clip_norm=1.0)
    facts = expert_facts(other, "a", None, None)
    assert facts.own_objective == "weight decay 0.1, the sharpest point within 0.05"
    assert facts.clipped


def test_a_merge_that_is_not_linear_asks_for_its_own_stability(experts):
    record = bound_files(experts, recipe=Recipe(method="ties"))
    term = record.metrics["bound"]["terms"]["delta2"]
    assert (term["value"], term["note"]) == (None, "needs Delta_M^2 of refits")
    assert record.metrics["constants"] is None


def test_coefficients_that_differ_by_layer_are_told_by_block(experts):
    recipe = Recipe(method="lines", config={"beta": 0.3})
    told = bound_files(experts, recipe=recipe).metrics["bound"]
    blocks = told["weighing"]["blocks"]
    assert blocks["blocks.1"]["a_eff"] > blocks["blocks.0"]["a_eff"]
    assert blocks["blocks.0"]["coefficients"] == (0.5, 0.5)
    note = told["terms"]["delta2"]["note"]
    assert note.startswith("by parts of the displacement; at most")
    assert "no rounding twin: of 2 of 2 experts" in note
    assert told["terms"]["mismatch"]["note"] == "needs L, gradients by block"


@pytest.mark.slow
def test_equal_coefficients_by_layer_are_bounded_as_the_average(experts, tiny_suite):
    where = Calibration(suite=tiny_suite, options=SplitOptions(reserve=8))
    level = Recipe(method="lines", config={"beta": 0.0})
    plain, told = (
        bound_files(experts, recipe=recipe, calibration=where, effort=LITTLE).metrics["bound"]
        for recipe in (None, level)
    )
    assert told["weighing"]["blocks"]
    assert told["total"] == pytest.approx(plain["total"], rel=1e-6)
    noise = [one["terms"]["merged_noise"]["value"] for one in (told, plain)]
    assert noise[0] / noise[1] == pytest.approx(1)


def test_refits_of_a_linear_merge_give_its_formula(experts):
    """Delta_M^2 = sum_i p_i lambda_i^2 eps_i^2, of the same twins: those of the smallest m."""
    scaled = [Recipe(method="task_arithmetic", config={"scale": scale}) for scale in (1.0, 0.3)]
    for recipe in (Recipe(method="average"), *scaled):
        terms = bound_files(experts, recipe=recipe, refits=True).metrics["bound"]["terms"]
        assert terms["delta2_by_refits"]["value"] == pytest.approx(
            terms["delta2"]["value"], rel=1e-3, abs=0.0
        )


@pytest.mark.parametrize(("below", "m"), [({"1"}, "4"), ({"1", "4"}, None)])
def test_refits_are_those_beyond_the_rounding(experts, tmp_path, below, m):
    folder = shutil.copytree(experts[0].parent, tmp_path / "copy")
    copied = [folder / path.name for path in experts]
    found = read_measurements(copied[0])["stability"]
    for name, told in found["replaced"].items():
        told["above_rounding"] = name not in below
    add_measurements(copied[0], {"stability": found})
    terms = bound_files(copied, refits=True).metrics["bound"]["terms"]
    if m is None:
        for name in ("delta2", "delta2_by_refits"):
            assert terms[name]["value"] is None
            assert terms[name]["note"] == "needs twins further off than the rounding twin"
    else:
        other = read_measurements(copied[1])["stability"]["replaced"]["1"]
        eps2 = found["replaced"][m]["backbone"]["mean"] + other["backbone"]["mean"]
        assert terms["delta2_by_refits"]["value"] == pytest.approx(eps2 / 8, rel=1e-3, abs=0.0)


def test_refits_of_any_merge_give_its_stability(experts, tmp_path):
    record = bound_files(experts, recipe=Recipe(method="ties"), refits=True)
    assert record.metrics["bound"]["terms"]["delta2"]["value"] > 0
    alone = tmp_path / experts[0].name
    alone.write_bytes(experts[0].read_bytes())
    with pytest.raises(FileNotFoundError, match="No refits of"):
        bound_files([alone, experts[1]], refits=True)


@pytest.mark.parametrize("method", ["emr", "tall_masks"])
def test_refits_of_a_model_for_each_task_are_looked_at_by_task(experts, opened, method):
    gathered, *_ = opened
    plain = merge(gathered, method)
    squares = []
    for i, task in enumerate(gathered.names):
        twin = load_expert(experts[i].with_suffix(".twins") / "m1-0.safetensors")
        tuned = [*gathered.tuned]
        tuned[i] = twin.backbone
        other = merge(dataclasses.replace(gathered, tuned=tuned), method)
        here, there = plain.for_task(task), other.for_task(task)
        squares += [float((there[n] - here[n]).double().square().sum()) for n in here]
    record = bound_files(experts, recipe=Recipe(method=method), refits=True)
    found = record.metrics["bound"]["terms"]["delta2_by_refits"]["value"]
    assert found == pytest.approx(sum(squares) / 2, rel=1e-5, abs=0.0)
    assert found > 0


def test_refits_of_a_merge_that_looks_at_more_are_told_to_see_the_same(experts, capsys):
    words = ["bound", *map(str, experts), "--refits", "true"]
    assert main([*words, "--method", "travel_normalised"]) == 0
    assert "through the experts alone: refits see the same cards" in capsys.readouterr().out


@pytest.mark.parametrize(("base", "there"), [(VIT, False), ("timm/test_resnet@random:0", True)])
def test_only_statistics_that_are_there_are_recalibrated(opened, base, there):
    gathered, *_ = opened
    changed = dataclasses.replace(gathered, structure=load_base(base, image_size=8)[1].structure)
    assert is_recalibrated(Recipe(batch_norm="recalibrate"), changed) == there
    assert not is_recalibrated(Recipe(batch_norm="average"), changed)


def test_refits_of_another_training_are_refused(experts, tmp_path, capsys):
    """An expert that was written anew by other means, beside the twins of the one before."""
    again = tmp_path / experts[0].name
    one = load_expert(experts[0])
    save_expert(again, dataclasses.replace(one, card=dataclasses.replace(one.card, lr=0.1)))
    twins = experts[0].with_suffix(".twins")
    shutil.copytree(twins, again.with_suffix(".twins"))
    assert main(["bound", str(again), str(experts[1]), "--refits", "true"]) == 2
    error = capsys.readouterr().err
    assert "must be a twin of" in error
    assert error.count("\n") == 1


def test_the_command_tells_cards_alone(experts, capsys):
    words = ["bound", *map(str, experts), "--method", "task_arithmetic", "--scale", "0.3"]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["recipe"]["config"] == {"scale": 0.3}
    assert record["metrics"]["bound"]["terms"]["drift"]["note"] == "needs L"
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "chi2_w" in out
    assert "does not hold: Coefficients sum to 0.6" in out


@pytest.mark.parametrize("command", ["bound", "constants"])
def test_a_command_without_a_word_names_what_is_missing(capsys, command):
    assert main([command]) == 2
    assert "`experts` must be given" in capsys.readouterr().err


def test_methods_are_compared_in_one_table_and_one_page(experts, tmp_path, capsys):
    words = ["bound", *map(str, experts), "--method", "average,ties", "--out", str(tmp_path / "b")]
    assert main([*words, "--logger", "wandb"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"average +ties", out)
    assert "ties: does not hold" in out
    page = (tmp_path / "b" / "report.html").read_text("utf-8")
    assert "What bounds the excess error" in page
    records = [Record.read(tmp_path / "b" / f"{m}.record.json") for m in ("average", "ties")]
    assert [record.config["recipe"]["method"] for record in records] == ["average", "ties"]
    assert list((tmp_path / "b" / "logs" / "bound").rglob("*.wandb"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "average,average"], "each once"),
        (["--method", "average,ties", "--out", "b.json"], "must be a folder for the records of 2"),
        (["--method", "average,tis"], "Did you mean 'ties'"),
        (["--logger", "wandb"], "must be told a folder"),
        (["--out", "x.txt"], "must be a folder, or a file ending in .json, but is 'x.txt'"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(
    experts, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["bound", *map(str, experts), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_bounds_may_be_named_by_a_number(experts, tmp_path):
    for name in ("lr0.01", "there.v2"):
        folder = tmp_path / name
        if name == "there.v2":
            folder.mkdir()
        assert main(["bound", *map(str, experts), "--out", str(folder)]) == 0
        assert (folder / "average.record.json").is_file()


@pytest.mark.parametrize("method", ["tall_masks", "surgery"])
def test_nothing_is_written_where_one_method_has_a_model_for_each_task(
    experts, tiny_suite, tmp_path, capsys, method
):
    out = tmp_path / "compared"
    words = ["bound", *map(str, experts), "--data.suite", tiny_suite, "--data.reserve", "8"]
    assert main([*words, "--method", f"average,{method}", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{method!r} makes each task a model of its own" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_constants_are_told_with_their_intervals(experts, tiny_suite, capsys):
    words = ["constants", *map(str, experts), "--data.suite", tiny_suite, "--data.reserve", "8"]
    little = [f"--effort.{name}={value}" for name, value in vars(LITTLE).items()]
    assert main([*words, *little]) == 0
    out = capsys.readouterr().out
    for name in ("sigma^2, dots", "zeta^2, stripes", "dominant eigenvalue", " to "):
        assert name in out
    assert main(["constants", *map(str, experts)]) == 2
    assert "`data.suite` must name the suite" in capsys.readouterr().err


def test_a_record_of_constants_ends_in_json(experts, tiny_suite, tmp_path, capsys):
    words = ["constants", *map(str, experts), "--data.suite", tiny_suite, "--data.reserve", "8"]
    assert main([*words, "--out", str(tmp_path / "o9")]) == 2
    error = capsys.readouterr().err
    assert "`out` must be a record's file, ending in .json" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_merge_of_nothing_is_said_to_be_the_base(experts, tmp_path, capsys):
    words = ["merge", *map(str, experts), "--method", "task_arithmetic", "--scale"]
    for scale, said in (("0", True), ("0.1", False)):
        assert main([*words, scale, "--out", str(tmp_path / f"{scale}.safetensors")]) == 0
        assert ("All coefficients are 0" in capsys.readouterr().out) == said


@pytest.mark.parametrize("by", ["step", "path"])
def test_the_bound_s_own_merge_travels_as_far_as_the_average(experts, tiny_suite, tmp_path, by):
    where = Calibration(suite=tiny_suite, options=SplitOptions(reserve=8))
    recipe = Recipe(method="bound_optimal", config={"by": by, "images": 8, "batch": 4})
    result = merge_files(experts, out=tmp_path / "m.safetensors", recipe=recipe, calibration=where)
    coefficients = result.record.metrics["merged"]["coefficients"]
    travels = [load_expert(path).card.travel for path in experts]
    moved = sum(a * b for a, b in zip(coefficients, travels, strict=True))
    assert moved == pytest.approx(sum(travels) / 2)
    assert min(coefficients) >= 0


@pytest.mark.parametrize("by", ["step", "path"])
def test_the_bound_s_own_merge_by_layer_travels_as_far(experts, tiny_suite, tmp_path, by):
    where = Calibration(suite=tiny_suite, options=SplitOptions(reserve=8))
    recipe = Recipe(
        method="bound_optimal", config={"by": by, "granularity": "layer", "images": 4, "batch": 2}
    )
    result = merge_files(experts, out=tmp_path / "m.safetensors", recipe=recipe, calibration=where)
    merged = load_merged(result.path)
    rows = merged.facts.get("coefficients_by_tensor") or {"all": merged.facts["coefficients"]}
    travels = [load_expert(path).card.travel for path in experts]
    for row in rows.values():
        assert min(row) >= 0
    far = [sum(a * b for a, b in zip(row, travels, strict=True)) for row in rows.values()]
    assert min(far) <= sum(travels) / 2 * (1 + 1e-6) <= max(far) * (1 + 2e-6)


@pytest.mark.parametrize(
    ("card", "scale", "message"),
    [({"base_hash": "0" * 64}, 1.0, "experts of one base"), ({}, 1e18, "loss must be finite")],
)
def test_experts_that_cannot_be_bounded_are_refused(
    experts, tiny_suite, tmp_path, capsys, card, scale, message
):
    one = load_expert(experts[0])
    weights = {name: t * scale if t.is_floating_point() else t for name, t in one.backbone.items()}
    other = tmp_path / experts[0].name
    changed = dataclasses.replace(one.card, **card)
    save_expert(other, dataclasses.replace(one, backbone=weights, card=changed))
    data = ["--data.suite", tiny_suite, "--data.reserve", "8"]
    assert main(["bound", str(experts[1]), str(other), *data]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.suite", "SUITE", "--data.reserve", "9"], "their hash differs"),
        (
            ["--data.suite", "SUITE", "--data.reserve", "8", "--effort.batch", "60"],
            "need 480 images",
        ),
        (
            ["--effort.lanczos_steps", "0", "--data.suite", "SUITE", "--data.reserve", "8"],
            "`lanczos_steps`",
        ),
        (["--method", "tis"], "Did you mean 'ties'"),
        (["--method", "emr", "--data.suite", "SUITE", "--data.reserve", "8"], "model of its own"),
    ],
)
def test_bad_input_is_one_line(experts, tiny_suite, capsys, flags, message):
    words = [tiny_suite if word == "SUITE" else word for word in flags]
    assert main(["bound", *map(str, experts), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
