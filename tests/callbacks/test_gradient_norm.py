import math

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from mergekit_lit.callbacks import GradientNorm


def norm_of(gradients):
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def optimizer_of(module):
    return module.trainer.optimizers[0]


def own_gradients(module, batches):
    """Gradients of the mean loss over batches, by name, at the module's present parameters."""
    losses = [module.training_step(batch, i) for i, batch in enumerate(batches)]
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(sum(losses) / len(losses), parameters), strict=True))


class Silent:
    """A training_step without Lightning's log, to compute gradients by hand."""

    def __init__(self, module):
        self.module = module

    def __enter__(self):
        self.module.log = lambda *_, **__: None
        return self.module

    def __exit__(self, *_):
        del self.module.log


def first_gradients(tiny, images, *, batches=1):
    module, data = tiny(), images()
    with Silent(module):
        return own_gradients(
            module, [batch for batch, _ in zip(data, range(batches), strict=False)]
        )


def test_norms_are_those_of_the_gradient_by_group(tiny, images, fit):
    rows = fit(tiny(), GradientNorm(per_parameter=True), max_steps=1)
    gradients = first_gradients(tiny, images)
    groups = {
        "gradient/norm": list(gradients),
        "gradient/norm/stem": [
            f"backbone.{n}" for n in ("1.weight", "1.bias", "2.weight", "2.bias")
        ],
        "gradient/norm/block": ["backbone.4.weight", "backbone.4.bias"],
        "gradient/norm/backbone": [name for name in gradients if name.startswith("backbone")],
        "gradient/norm/head": ["head.weight", "head.bias"],
        "gradient/parameter/head.bias": ["head.bias"],
    }
    for metric, names in groups.items():
        expected = norm_of(gradients[name] for name in names)
        assert rows[0][metric] == pytest.approx(expected, rel=1e-5), metric
    assert rows[0]["gradient/norm_clipped"] == rows[0]["gradient/norm"]
    assert rows[0]["gradient/clip_factor"] == 1.0


CLIPPING = [
    {},
    {"gradient_clip_val": 0.2},
    {"gradient_clip_val": 100.0},
    {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    {"gradient_clip_val": 0.2, "accumulate_grad_batches": 3},
    {"gradient_clip_val": 0.2, "precision": "bf16-mixed"},
    {"gradient_clip_val": 0.2, "plugins": "fp16"},
    {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value", "plugins": "fp16"},
]


@pytest.mark.parametrize("arguments", CLIPPING, ids=str)
def test_the_clipped_norm_is_what_the_optimizer_uses(tiny, fit, arguments):
    arguments = dict(arguments)
    if arguments.get("plugins") == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        arguments["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    module, callback = tiny(), GradientNorm()
    rows = fit(module, callback, max_steps=4, **arguments)
    used = [norm_of(gradients) for gradients in optimizer_of(module).used]
    every = arguments.get("accumulate_grad_batches", 1)
    stepping = rows[every - 1 :: every]
    assert len(used) == 4
    for row, expected in zip(stepping, used, strict=True):
        assert row["gradient/norm_clipped"] == pytest.approx(expected, rel=1e-5)
        ratio = row["gradient/norm_clipped"] / row["gradient/norm"]
        assert row["gradient/clip_factor"] == pytest.approx(ratio, rel=1e-5)
    clips = 0 < arguments.get("gradient_clip_val", 0) < 1
    assert (min(row["gradient/clip_factor"] for row in stepping) < 0.99) == clips


@pytest.mark.parametrize("arguments", [{}, {"gradient_clip_val": 0.2}])
def test_the_norm_before_clipping_is_unscaled_and_that_of_the_whole_step(
    tiny, images, fit, arguments
):
    """Accumulation over 3 micro-batches, under a loss scale: the norm of the mean gradient."""
    rows = fit(tiny(), GradientNorm(), max_steps=1, accumulate_grad_batches=3, **arguments)
    expected = norm_of(first_gradients(tiny, images, batches=3).values())
    assert "gradient/norm" not in rows[0]
    assert "gradient/norm" not in rows[1]
    assert rows[2]["gradient/norm"] == pytest.approx(expected, rel=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    scaled = fit(tiny(), GradientNorm(), max_steps=1, accumulate_grad_batches=3, plugins=plugins)
    assert scaled[2]["gradient/norm"] == pytest.approx(expected, rel=0.02)


def test_running_statistics_are_those_of_every_step(tiny, fit):
    module, callback = tiny(), GradientNorm()
    rows = fit(module, callback, max_steps=6, log_every_n_steps=3)
    used = torch.tensor([norm_of(gradients) for gradients in optimizer_of(module).used])
    found = callback.statistics()["gradient/norm"]
    assert found["mean"] == pytest.approx(float(used.mean()), rel=1e-5)
    assert found["std"] == pytest.approx(float(used.std(correction=0)), rel=1e-4)
    assert found["max"] == pytest.approx(float(used.max()), rel=1e-5)
    assert callback.card_facts() == {"gradient_norm": found["mean"]}
    assert [("gradient/norm" in row) for row in rows] == [False, False, True, True, True, True]
    assert rows[5]["gradient/norm_mean"] == found["mean"]


def test_steps_that_the_scaler_skips_enter_no_statistic(tiny, fit):
    """An infinite loss at the second step: the scaler skips it and halves its scale."""
    module = tiny(loss_scale=lambda index: math.inf if index == 1 else 1.0)
    callback = GradientNorm()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    rows = fit(module, callback, max_steps=4, plugins=plugins)
    used = [norm_of(gradients) for gradients in optimizer_of(module).used]
    assert len(used) == 3
    assert rows[-1]["gradient/skipped"] == 1
    statistics = callback.statistics()
    assert statistics["gradient/norm"]["mean"] == pytest.approx(sum(used) / 3, rel=1e-4)


def test_a_modules_own_clipping_is_measured(tiny, fit):
    class Own(tiny):
        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val, gradient_clip_algorithm
        ):
            for parameter in self.parameters():
                parameter.grad.mul_(0.25)

    module = Own()
    rows = fit(module, GradientNorm(), max_steps=2)
    assert rows[0]["gradient/clip_factor"] == pytest.approx(0.25, rel=1e-6)
    used = [norm_of(gradients) for gradients in optimizer_of(module).used]
    assert rows[1]["gradient/norm_clipped"] == pytest.approx(used[1], rel=1e-5)
    assert "configure_gradient_clipping" not in vars(module)


def test_manual_optimization_is_measured_as_handed_over(tiny, fit):
    class Manual(tiny):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module = Manual()
    rows = fit(module, GradientNorm(), max_steps=2)
    used = [norm_of(gradients) for gradients in optimizer_of(module).used]
    assert rows[-1]["gradient/norm"] == pytest.approx(used[-1], rel=1e-5)


def test_frozen_parameters_and_unknown_structure(tiny, fit):
    """A module without structure: groups are the top-level parts; frozen parts have no norm."""
    module = tiny()
    del module.structure
    module.head.requires_grad_(requires_grad=False)
    rows = fit(module, GradientNorm(), max_steps=1)
    groups = {name for name in rows[0] if name.startswith("gradient/norm/")}
    assert groups == {"gradient/norm/backbone"}


def test_the_numbers_are_read_back_once_a_logging_step(tiny, fit, monkeypatch):
    """Counts every way in which a tensor's value reaches Python while the callback works."""
    reads, watching = [], []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, _original=original, _name=name, **kwargs):
            if watching:
                reads.append(_name)
            return _original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    class Watched(GradientNorm):
        def _norms(self, *args):
            watching.append(1)
            found = super()._norms(*args)
            watching.clear()
            return found

        def _record(self, *args):
            watching.append(1)
            super()._record(*args)
            watching.clear()

        def on_train_batch_end(self, *args):
            watching.append(1)
            super().on_train_batch_end(*args)
            watching.clear()

    fit(tiny(), Watched(), max_steps=6, log_every_n_steps=3, gradient_clip_val=0.1)
    assert reads == ["tolist", "tolist"]
