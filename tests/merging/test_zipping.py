"""ZipIt and REPAIR on networks at work: planted orders are undone, planted shrinkage is too."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import load_merged, save_merged
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.permutations import permutation_sizes
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.lit.recalibration import recalibrate
from mergekit_lit.merging import merge, save_raw
from mergekit_lit.merging.methods.alignment import permuted
from mergekit_lit.merging.methods.repair import output_moments, repair
from mergekit_lit.models.capture import network
from mergekit_lit.models.structure import structure_of

NAMES = ["a", "b", "c"]


class Net(nn.Module):
    """A convolution, BatchNorm, a second convolution, a linear layer: two spaces and features."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv2(self.bn1(self.conv1(x)).relu()).relu()
        return self.fc(x.mean(dim=(2, 3)))


AXES = {
    "conv1.weight": ("stem", None, None, None),
    "conv2.weight": ("inner", "stem", None, None),
    "conv2.bias": ("inner",),
    "fc.weight": ("features", "inner"),
    "fc.bias": ("features",),
    **{f"bn1.{leaf}": ("stem",) for leaf in ("weight", "bias", "running_mean", "running_var")},
}


class Noise:
    """Sixty random images of one task."""

    def __init__(self, seed):
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(60, 3, 8, 8, generator=draw, dtype=torch.float64)

    def __len__(self):
        return len(self.x)

    def take(self, positions):
        return Batch(self.x[positions], None)


def made(seed) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net().double()
        net.bn1.running_mean.normal_()
        net.bn1.running_var.uniform_(0.5, 2)
    return net.state_dict()


def family(tuned) -> Experts:
    structure = {
        name: TensorInfo(info.kind, info.depth, info.group, AXES.get(name, ()))
        for name, info in structure_of(Net()).items()
    }
    count = len(tuned)
    head = torch.randn(2, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Experts(
        base=tuned[0],
        tuned=tuned,
        structure=structure,
        cards=[Card()] * count,
        heads=[{"weight": head}] * count,
        names=NAMES[:count],
    )


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    works = network(Net())
    samples = {name: Noise(seed) for seed, name in enumerate(NAMES)}
    return Calibration("train", samples, works, works, lambda _, features: features)


def answers(merged, calibration, task="a"):
    x = calibration.samples["a"].x[:8]
    return calibration.expert.features(merged.for_task(task), x) @ merged.heads[task]["weight"].T


@pytest.mark.parametrize("count", [2, 3])
def test_zipping_undoes_a_planted_order(calibration, count):
    original = family([made(0)] * count)
    draw = torch.Generator().manual_seed(3)
    orders = [
        {
            key: torch.randperm(size, generator=draw)
            for key, size in permutation_sizes(original.base, original.structure).items()
        }
        for _ in range(count)
    ]
    experts = permuted(original, [{}, *orders[1:]])
    merged = merge(experts, "zipit", calibration=calibration, batch_norm="average")
    for name, tensor in original.base.items():
        torch.testing.assert_close(merged.shared[name], tensor, msg=name)
    for task in experts.names:
        expected = answers(merge(original, "average"), calibration)
        torch.testing.assert_close(answers(merged, calibration, task), expected)


def test_redundant_units_of_one_expert_make_room_for_another(calibration):
    """Two units of `a` are copies; with a budget they become one, and none of b's is averaged."""
    params = made(1)
    for name in ("conv2.weight", "conv2.bias"):
        params[name] = params[name].clone()
        params[name][1] = params[name][0]
    experts = family([params, params])
    merged = merge(
        experts, "zipit", config={"beta": 1.0, "alpha": 0.0}, calibration=calibration,
        batch_norm="average",
    )  # fmt: skip
    expected = answers(merge(experts, "average", batch_norm="average"), calibration)
    torch.testing.assert_close(answers(merged, calibration), expected)


STAGES = {"conv1": "stem", "bn1": "stem", "conv2": "layer1", "fc": "layer2"}


def staged(tuned) -> Experts:
    """Experts whose layers are the stages stem, layer1 and layer2."""
    experts = family(tuned)
    structure = {
        name: replace(info, depth=list(STAGES.values()).index(stage), group=stage)
        for name, info in experts.structure.items()
        for stage in [STAGES[name.split(".")[0]]]
    }
    return replace(experts, structure=structure)


def with_tail(trunk, tail):
    """A network of which the layers after the first are another's."""
    return {n: (trunk if n.startswith(("conv1", "bn1")) else tail)[n] for n in trunk}


def test_in_part_the_last_stages_stay_each_experts_own(calibration):
    """Of one trunk in two orders, each task gets its expert's answers; zipping all mixes them."""
    original = staged([with_tail(made(0), made(seed)) for seed in (0, 1)])
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    experts = permuted(original, [{}, {"stem": order}])
    merged = merge(
        experts, "zipit", config={"until": "stem"}, calibration=calibration, batch_norm="average"
    )
    whole = merge(experts, "zipit", calibration=calibration, batch_norm="average")
    for t, task in enumerate(experts.names):
        alone = replace(merged, shared=original.tuned[t], own={}, statistics={})
        expected = answers(alone, calibration, task)
        torch.testing.assert_close(answers(merged, calibration, task), expected)
        assert not torch.allclose(answers(whole, calibration, task), expected, atol=1e-2)
    assert set(merged.own["a"]) == {"conv2.weight", "conv2.bias", "fc.weight", "fc.bias"}
    # The second reads the units where the first has them.
    torch.testing.assert_close(merged.own["b"]["conv2.weight"], original.tuned[1]["conv2.weight"])
    torch.testing.assert_close(merged.shared["conv1.weight"], original.tuned[0]["conv1.weight"])


def test_the_last_stage_is_the_whole(calibration):
    experts = staged([made(0), made(1)])
    last, whole = (
        merge(experts, "zipit", config={"until": until}, calibration=calibration)
        for until in ("layer2", None)
    )
    assert not last.own
    assert all(torch.equal(last.shared[name], tensor) for name, tensor in whole.shared.items())


def test_what_stays_a_tasks_own_survives_the_file_and_is_refused_elsewhere(tmp_path, calibration):
    experts = replace(staged([made(0), made(1)]), kept=frozenset({"fc.bias"}))
    merged = merge(
        experts, "zipit", config={"until": "stem"}, calibration=calibration, out_dtype="bfloat16"
    )
    assert "fc.bias" not in merged.own["a"]
    save_merged(tmp_path / "m.safetensors", merged)
    read = load_merged(tmp_path / "m.safetensors")
    for task in experts.names:
        expected = merged.for_task(task)
        assert all(torch.equal(t, expected[name]) for name, t in read.for_task(task).items())
        assert read.own[task]["fc.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="gives each task a part of its own"):
        save_raw(tmp_path / "plain.safetensors", merged)
    with pytest.raises(ValueError, match="makes each task a model of its own"):
        recalibrate(merged, {}, backbone=None, per_task=False)
    with pytest.raises(ValueError, match="leaves each task layers, masks or adapters of its own"):
        repair(experts, calibration, merged)


def test_a_stage_must_be_known_and_end_its_units(calibration):
    experts = staged([made(0), made(1)])
    with pytest.raises(KeyError, match="No stage to zip `until` named 'layer'"):
        merge(experts, "zipit", config={"until": "layer"}, calibration=calibration)
    through = dict(experts.structure)
    through["conv2.bias"] = replace(through["conv2.bias"], axes=("stem",))
    experts = replace(experts, structure=through)
    message = r"whose units end with it \(layer1, layer2\), but those of 'stem' go on"
    with pytest.raises(ValueError, match=message):
        merge(experts, "zipit", config={"until": "stem"}, calibration=calibration)


def test_bad_values_are_refused(calibration):
    experts = family([made(0), made(1)])
    for config, message in (
        ({"beta": 1.5}, r"`beta` must lie in \[0, 1\]"),
        ({"samples": 0}, "`samples` must be at least 1, but is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(experts, "zipit", config=config, calibration=calibration)
    with pytest.raises(ValueError, match="`samples` must be at least 2, but is 1"):
        merge(experts, "repair", config={"samples": 1}, calibration=calibration)


def biased_moments(params, experts, calibration):
    pool = [torch.cat([calibration.samples[name].x for name in experts.names])]
    return output_moments(calibration.merged, params, pool, ["conv2.weight", "fc.weight"])


def test_repaired_layers_have_the_experts_mean_and_deviation(calibration):
    experts = family([made(0), made(1)])
    repaired = merge(experts, "repair", calibration=calibration, batch_norm="average")
    # Under "average" the engine sets the statistics last, so look with the base's, as repair did.
    seen = biased_moments({**repaired.shared, **_statistics(experts)}, experts, calibration)
    goals = [biased_moments(params, experts, calibration) for params in experts.tuned]
    for name, moments in seen.items():
        torch.testing.assert_close(moments, (goals[0][name] + goals[1][name]) / 2)
    plain = merge(experts, "average").shared
    shrunk = biased_moments(plain, experts, calibration)["fc.weight"][1]
    assert (shrunk < seen["fc.weight"][1]).all()
    assert torch.equal(repaired.shared["conv1.weight"], plain["conv1.weight"])


def _statistics(experts):
    return {n: t for n, t in experts.base.items() if experts.structure[n].kind == "statistic"}


def test_repair_follows_another_method(calibration):
    experts = family([made(0), made(1)])
    veneered = merge(experts, "task_arithmetic", veneers=[("repair", {})], calibration=calibration)
    by_hand = repair(experts, calibration, merge(experts, "task_arithmetic"))
    for name, tensor in by_hand.shared.items():
        assert torch.equal(veneered.shared[name], tensor)
    with pytest.raises(ValueError, match="'repair' looks at train images of every task"):
        merge(experts, "task_arithmetic", veneers=[("repair", {})])


def test_batch_norm_that_is_not_reset_is_told_how(calibration):
    experts = family([made(0), made(1)])
    bare = {n: t for n, t in made(0).items() if n not in ("conv2.bias", "fc.bias")}
    spare = replace(experts, base=bare, tuned=[bare, bare])
    with pytest.raises(ValueError, match="Merge with `--batch_norm recalibrate`, which resets it"):
        repair(spare, replace(calibration, statistics=_statistics(experts)))
