"""Alignment: a planted order of units is found and undone, and nothing else changes."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import add
from mergekit_lit.core.permutations import permutation_sizes, permute
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import merge, plan
from mergekit_lit.merging.methods.alignment import git_rebasin, match_weights, permuted
from mergekit_lit.models.backbones import load_base
from mergekit_lit.models.structure import structure_of


def planted(params, structure, seed=0):
    """Return a random permutation for every name."""
    draw = torch.Generator().manual_seed(seed)
    sizes = permutation_sizes(params, structure)
    return {key: torch.randperm(size, generator=draw) for key, size in sizes.items()}


def pair(base, *, scrambled=True, step=0.0) -> Experts:
    """Return two experts near one base, the units of the second in a planted order."""
    features = permutation_sizes(base.params, base.structure)["features"]
    tuned = [noisy(base.params, base.structure, seed, step) for seed in (1, 2)]
    head = {"weight": torch.randn(3, features, generator=torch.Generator().manual_seed(3))}
    experts = Experts(
        base=base.params,
        tuned=tuned,
        structure=base.structure,
        cards=[Card(task="a"), Card(task="b")],
        heads=[head, {**head, "bias": torch.ones(3), "scale": torch.tensor(2.0)}],
        names=["a", "b"],
        backbone=base.backbone,
    )
    orders = planted(base.params, base.structure)
    return permuted(experts, [{}, orders]) if scrambled else experts


def noisy(params, structure, seed, size):
    draw = torch.Generator().manual_seed(seed)
    step = {
        name: size * tensor.std() * torch.randn(tensor.shape, generator=draw)
        for name, tensor in params.items()
        if structure[name].is_merged
    }
    return add(params, step)


def logits(backbone, params, head, images):
    with torch.no_grad():
        features = torch.func.functional_call(backbone.eval(), dict(params), (images,))
    return features @ head["weight"].T


@pytest.fixture(scope="module", params=["resnet", "vit"])
def trained(request):
    """The shipped networks: trained ones have no two units alike."""
    return load_base(request.param)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_planted_order_is_undone_and_the_merge_is_the_original(trained):
    _, base = trained
    merged = merge(pair(base), "git_rebasin", batch_norm="average")
    for name, tensor in base.params.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(merged.shared[name], tensor, msg=name)
    scrambled = merge(pair(base), "average", batch_norm="average")
    first = next(iter(base.params))
    assert (scrambled.shared[first] - base.params[first]).norm() > 0.3 * base.params[first].norm()


def test_what_an_expert_computes_stays_and_its_head_follows(trained, images):
    backbone, base = trained
    experts = pair(base, step=0.05)
    aligned = git_rebasin(experts)
    assert torch.equal(aligned.heads[1]["bias"], torch.ones(3))
    assert set(aligned.heads[1]) == {"weight", "bias", "scale"}
    for t in range(2):
        before = logits(backbone, experts.tuned[t], experts.heads[t], images)
        after = logits(backbone, aligned.tuned[t], aligned.heads[t], images)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_experts_of_one_base_stay_where_they_are(trained):
    _, base = trained
    experts = pair(base, scrambled=False, step=0.3)
    for reference in ("first", "base"):
        aligned = git_rebasin(experts, reference=reference)
        assert all(torch.equal(aligned.tuned[1][n], t) for n, t in experts.tuned[1].items())


def test_experts_of_another_base_move_together():
    """Each by itself goes its own way, where the reference has little in common with either."""
    (_, base), (_, away) = (load_base(f"resnet@random:{seed}") for seed in range(2))
    tuned = [base.params, *(noisy(away.params, base.structure, seed, 0.3) for seed in (1, 2))]
    names = [n for n, info in base.structure.items() if info.is_merged]

    def apart(hashes):
        cards = [Card(task=t, base_hash=h) for t, h in zip("abc", hashes, strict=True)]
        experts = replace(pair(base), tuned=tuned, cards=cards, heads=[{}] * 3, names=list("abc"))
        _, one, other = git_rebasin(experts).tuned
        return sum(float((one[n] - other[n]).square().sum()) for n in names)

    before = sum(float((tuned[1][n] - tuned[2][n]).square().sum()) for n in names)
    assert apart(("x", "y", "y")) == pytest.approx(before, rel=1e-5)
    assert apart((None, None, None)) > 1.5 * before


def test_alignment_to_the_base_does_not_depend_on_the_order_of_experts(tiny_experts):
    orders = [planted(tiny_experts.base, tiny_experts.structure, seed) for seed in range(3)]
    experts = permuted(tiny_experts, orders)
    turned = replace(experts, tuned=experts.tuned[::-1], heads=experts.heads[::-1])
    aligned = git_rebasin(experts, reference="base")
    other = git_rebasin(turned, reference="base")
    for name, tensor in tiny_experts.tuned[1].items():
        assert torch.equal(aligned.tuned[1][name], tensor)
        assert torch.equal(other.tuned[1][name], tensor)
    assert torch.equal(aligned.heads[1]["weight"], tiny_experts.heads[1]["weight"])


BUILDS = {
    "basic blocks": lambda: ResNet(
        BasicBlock, (2, 1, 1, 2), channels=(8, 16, 16, 24), num_classes=0
    ),
    "bottlenecks": lambda: ResNet(Bottleneck, (2, 1, 1, 1), channels=(8, 8, 8, 12), num_classes=0),
    "vit": lambda: timm.create_model(
        "test_vit", img_size=32, num_classes=0, init_values=0.5, qk_norm=True
    ),
}


@pytest.mark.parametrize("build", BUILDS)
def test_every_tied_permutation_is_found(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILDS[build]()
    params, structure = model.state_dict(), structure_of(model)
    orders = planted(params, structure)
    found = match_weights(params, permute(params, structure, orders), structure)
    assert set(found) == set(orders)
    for key, order in orders.items():
        # Unit i of the original lies where the planted order has put it.
        assert torch.equal(order[found[key]], torch.arange(len(order))), key


def test_any_order_of_the_sweep_may_be_drawn_and_the_same_seed_draws_the_same(tiny_experts):
    with pytest.raises(ValueError, match="`sweeps` must be at least 1, but is 0"):
        git_rebasin(tiny_experts, sweeps=0)
    merged = [merge(tiny_experts, "git_rebasin", seed=seed) for seed in (3, 3)]
    assert merged[0].facts["config"]["seed"] == 3
    chosen = merge(tiny_experts, "git_rebasin", config={"seed": 1}, seed=3)
    assert chosen.facts["config"]["seed"] == 1
    for name, tensor in merged[0].shared.items():
        assert torch.equal(tensor, merged[1].shared[name])


def test_units_that_are_alike_stay_in_their_places(tiny_experts):
    dead = {n: torch.zeros_like(t) for n, t in tiny_experts.base.items()}
    experts = replace(tiny_experts, tuned=[tiny_experts.tuned[0], dead])
    matched = match_weights(experts.tuned[0], dead, experts.structure)
    assert all(torch.equal(order, torch.arange(len(order))) for order in matched.values())


def test_alignment_comes_before_another_method(tiny_experts):
    orders = [planted(tiny_experts.base, tiny_experts.structure, seed) for seed in range(3)]
    experts = permuted(tiny_experts, orders)
    veneered = merge(
        experts, "task_arithmetic", veneers=[("git_rebasin", {"reference": "base"})], seed=2
    )
    by_hand = merge(tiny_experts, "task_arithmetic")
    for name, tensor in by_hand.shared.items():
        torch.testing.assert_close(veneered.shared[name], tensor)
    assert torch.equal(veneered.heads["task1"]["weight"], tiny_experts.heads[1]["weight"])
    assert veneered.facts["veneers"][0]["config"]["seed"] == 2


def test_a_model_of_unknown_symmetries_is_refused(tiny_experts):
    blank = {n: TensorInfo(i.kind, i.depth, i.group) for n, i in tiny_experts.structure.items()}
    for backbone, why in (
        ("tiny", "the structure of 'tiny' names none .*whose stem is one convolution"),
        ("", "plain weights have no known architecture"),
    ):
        unknown = replace(tiny_experts, structure=blank, backbone=backbone)
        with pytest.raises(ValueError, match=why):
            merge(unknown, "git_rebasin")
        with pytest.raises(ValueError, match=why):
            plan(unknown, "git_rebasin")
        with pytest.raises(ValueError, match=why):
            plan(unknown, "average", veneers=[("git_rebasin", {})])
