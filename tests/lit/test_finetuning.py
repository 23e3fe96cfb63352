"""Tests of linearised, sharpness-aware and low-rank fine-tuning, by closed forms and tiny runs."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from mergekit_lit.callbacks import GradientNoise
from mergekit_lit.callbacks.expert_export import ExpertExport
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.params import content_hash
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.lora import LowRank
from mergekit_lit.lit.passes import inputs
from mergekit_lit.lit.sharpness import Ascent, statistics_kept
from mergekit_lit.lit.tangent import linearised

RESNET, VIT = "timm/test_resnet@random:0", "vit@random:0"
VARIANTS = {
    "linearised": {"finetuning": "linearised", "norm_statistics": "frozen"},
    "lora": {"finetuning": "lora", "lora_rank": 2, "lora_alpha": 4.0, "lr": 0.1},
    "sam": {"sam_radius": 0.1},
    "channels last": {"channels_last": True},
}


def make(base=RESNET, **options):
    defaults = {"image_size": 8, "lr": 0.01, "schedule": "constant", "warmup_steps": 0}
    return ExpertModule(base, **{**defaults, **options})


def test_the_tangent_model_is_linear_and_of_first_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    origin = {name: p.detach().clone() for name, p in net.named_parameters()}
    x = torch.randn(6, 4, dtype=torch.float64)

    def model(params):
        return torch.func.functional_call(net, params, (x,))

    def at(scale, tau):
        return linearised(model, origin, {n: origin[n] + scale * tau[n] for n in origin})

    one, two = ({n: torch.randn_like(p) for n, p in origin.items()} for _ in range(2))
    start = model(origin)
    both = {n: one[n] + two[n] for n in origin}
    torch.testing.assert_close(at(0.0, one), start)
    torch.testing.assert_close(at(1.0, both) - start, at(1.0, one) + at(1.0, two) - 2 * start)
    torch.testing.assert_close(at(3.0, one) - start, 3 * (at(1.0, one) - start))
    errors = []
    for scale in (1e-2, 1e-3):
        exact = model({n: origin[n] + scale * one[n] for n in origin})
        errors.append(float((exact - at(scale, one)).norm()))
    # The remainder is of second order.
    assert errors[1] / errors[0] == pytest.approx(1e-2, rel=0.1)


@pytest.mark.parametrize("base", [RESNET, VIT])
def test_linearised_logits_are_linear_in_the_displacement(base, fit, dots):
    """In the whole module, heads and attention included; training really moves it."""
    module = fit(make(base, **VARIANTS["linearised"]), dots(), steps=3)
    x = torch.from_numpy(module.data.task_data.test.x[:6])
    module.eval()
    moved = dict(module.backbone.named_parameters())
    assert any(not torch.equal(p, module.tangent.origin[n]) for n, p in moved.items())
    draw = torch.Generator().manual_seed(0)
    tau = {n: 0.01 * torch.randn(p.shape, generator=draw) for n, p in moved.items()}
    logits = []
    with torch.no_grad():
        for scale in (2.0, 1.0, 0.0):
            for name, p in moved.items():
                p.copy_(module.tangent.origin[name] + scale * tau[name])
            logits.append(module(x))
        start = module.head(module.backbone(inputs(module.backbone, x)))
    two, one, zero = logits
    assert float((one - zero).norm()) > 0.01
    torch.testing.assert_close(two - zero, 2 * (one - zero), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(zero, start, rtol=1e-4, atol=1e-4)


def test_a_sharpness_aware_step_on_a_quadratic_in_closed_form():
    """f = x' H x / 2: the gradient at x + r g / ||g|| is H (x + r H x / ||H x||)."""
    diagonal, radius = np.array([3.0, 0.5, 1.0]), 0.2
    x = nn.Parameter(torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64))
    start = x.detach().numpy().copy()
    hessian = torch.from_numpy(diagonal)
    ascent = Ascent([x])
    (gradient,) = torch.autograd.grad((hessian * x.square()).sum() / 2, [x])
    norm = ascent.up([gradient], radius)
    (above,) = torch.autograd.grad((hessian * x.square()).sum() / 2, [x])
    ascent.down()
    first = diagonal * start
    assert float(norm) == pytest.approx(np.linalg.norm(first))
    expected = diagonal * (start + radius * first / np.linalg.norm(first))
    assert np.allclose(above.numpy(), expected, rtol=1e-12)
    assert np.array_equal(x.detach().numpy(), start)


def test_where_the_gradient_is_zero_a_sharpness_aware_step_stays():
    x = nn.Parameter(torch.ones(2))
    ascent = Ascent([x])
    assert float(ascent.up([torch.zeros(2)], 0.1)) == 0
    assert torch.equal(x, torch.ones(2))


def test_statistics_are_kept_and_the_batch_normalises_as_before():
    layer = nn.BatchNorm1d(3)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with statistics_kept(layer):
        y = layer(x)
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert int(layer.num_batches_tracked) == 0
    assert torch.equal(layer(x), y)
    assert int(layer.num_batches_tracked) == 1


def test_sharpness_aware_steps_are_those_of_a_bare_loop(fit, dots):
    """Two passes, the weights' own gradient replaced, clipped by the norm of the second."""

    class Norms(Callback):
        def __init__(self):
            self.first, self.second = [], []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            found = [p.grad for p in module.parameters() if p.grad is not None]
            self.second.append(float(torch.cat([g.flatten() for g in found]).norm()))

        def on_train_batch_end(self, trainer, *_):
            self.first.append(float(trainer.callback_metrics["sam/first_norm"]))

    norms = Norms()
    radius = 0.5
    module = fit(make(sam_radius=radius, momentum=0.0), dots(), steps=1, callbacks=[norms])
    bare = fit(make(momentum=0.0, lr=1e-30), dots(), steps=1)
    x, y, _ = next(iter(module.trainer.train_dataloader))
    bare.train()
    named = [p for p in bare.parameters() if p.requires_grad]
    state = {n: t.clone() for n, t in bare.state_dict().items()}

    def gradient():
        loss = nn.functional.cross_entropy(bare(x), y)
        return torch.autograd.grad(loss, named)

    first = gradient()
    norm = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(named, first, strict=True):
            p.add_(radius * g / norm)
    second = gradient()
    assert norms.first == [pytest.approx(float(norm), rel=1e-4)]
    total = float(torch.cat([g.flatten() for g in second]).norm())
    assert norms.second == [pytest.approx(total, rel=1e-4)]
    bare.load_state_dict(state)
    pairs = zip(module.parameters(), bare.parameters(), strict=True)
    steps = [(now - start).detach() for now, start in pairs if start.requires_grad]
    taken, wanted, plain = (
        torch.cat([part.flatten() for part in parts])
        for parts in (steps, [-0.01 * g for g in second], [-0.01 * g for g in first])
    )
    assert float((taken - wanted).norm()) < 1e-2 * float(wanted.norm())
    assert float((plain - wanted).norm()) > 5e-2 * float(wanted.norm())
    # One update of the statistics a step, from the first pass.
    assert int(module.backbone.state_dict()["bn1.num_batches_tracked"]) == 1


def test_low_rank_steps_have_their_rank_and_start_at_the_base():
    shapes = {"a.weight": torch.Size([6, 5]), "conv.weight": torch.Size([4, 3, 3, 3])}
    params = {name: torch.randn(shape) for name, shape in shapes.items()}
    adapter = LowRank(shapes, rank=2, alpha=6.0, seed=0)
    for name, tensor in adapter(params).items():
        assert torch.equal(tensor, params[name])
    for up in adapter.up.values():
        nn.init.normal_(up)
    for name, tensor in adapter(params).items():
        delta = (tensor - params[name]).flatten(1)
        key = name.replace(".", "/")
        expected = 3.0 * adapter.up[key] @ adapter.down[key]
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
        assert int(torch.linalg.matrix_rank(delta.detach(), rtol=1e-4)) == 2
    again = LowRank(dict(reversed(shapes.items())), rank=2, alpha=6.0, seed=0)
    assert torch.equal(again.down["a/weight"], adapter.down["a/weight"])


@pytest.mark.parametrize("base", [RESNET, VIT])
def test_low_rank_experts_hold_the_full_weights(tmp_path, base, fit, dots):
    module = fit(make(base, **VARIANTS["lora"]), dots(), callbacks=[ExpertExport(tmp_path)])
    expert = load_expert(tmp_path / "dots.safetensors")
    moved = 0
    for name, start in module.base.params.items():
        if not expert.structure[name].is_merged:
            continue
        if name not in module.adapter.shapes:
            assert torch.equal(expert.backbone[name], start), name
            continue
        delta = (expert.backbone[name] - start).flatten(1).double()
        values = torch.linalg.svdvals(delta)
        moved += float(values[0]) > 0
        assert float(values[2:].sum()) <= 1e-3 * float(values[0]) + 1e-6
        assert torch.equal(module.backbone.state_dict()[name], start)
    assert moved
    assert (expert.card.finetuning, expert.card.lora_rank, expert.card.lora_alpha) == ("lora", 2, 4)
    assert expert.card.path_length is None


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, options, fit, dots):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    whole = fit(make(**options), dots(), callbacks=[Save(), ExpertExport(tmp_path)])
    rest = fit(
        make(**options),
        dots(),
        callbacks=[ExpertExport(tmp_path, name="rest")],
        resume=tmp_path / "two.ckpt",
    )
    assert content_hash(whole.state_dict()) == content_hash(rest.state_dict())
    assert (tmp_path / "dots.safetensors").read_bytes() == (
        tmp_path / "rest.safetensors"
    ).read_bytes()
    assert load_expert(tmp_path / "rest.safetensors").card.sam_radius == options.get(
        "sam_radius", 0.0
    )


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_measuring_the_noise_changes_nothing(options, fit, dots):
    plain = fit(make(**options), dots())
    watched = fit(make(**options), dots(), callbacks=[GradientNoise(every=1)])
    assert content_hash(plain.state_dict()) == content_hash(watched.state_dict())


def test_channels_last_changes_by_rounding_alone(fit, dots):
    plain = fit(make(), dots(), steps=2)
    last = fit(make(channels_last=True), dots(), steps=2)
    filters = [p for p in last.backbone.parameters() if p.dim() == 4 and p.shape[-1] > 1]
    assert filters
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, last.state_dict()[name], rtol=1e-3, atol=1e-4)


BAD = {
    "finetuning": ({"finetuning": "lorra"}, "No finetuning named 'lorra'. Did you mean 'lora'"),
    "radius": ({"sam_radius": -0.1}, "`sam_radius` must be at least 0, but is -0.1"),
    "rank": ({"lora_rank": 0}, "`lora_rank` must be at least 1, but is 0"),
    "alpha": ({"lora_alpha": 0.0}, "`lora_alpha` must be positive and finite, but is 0.0"),
    "statistics": ({"finetuning": "linearised"}, "`norm_statistics` must be 'frozen'"),
    "compile": ({"finetuning": "lora", "compile": True}, "`compile` must be off"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_told_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(**options)
    assert "\n" not in str(caught.value)


def test_accumulated_sharpness_aware_steps_are_refused(fit, dots):
    with pytest.raises(ValueError, match=r"`trainer.accumulate_grad_batches` must be 1"):
        fit(make(sam_radius=0.1), dots(), accumulate_grad_batches=2)
