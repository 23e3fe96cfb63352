import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from mergekit_lit.callbacks import GradientNoise, PathLength
from mergekit_lit.theory.stability import eps_path
from mergekit_lit.theory.travel import effective_steps, sgd_rule


class Positions(Callback):
    """Keeps the backbone's position, learning rate and noise around every step."""

    def __init__(self, noise=None):
        self.noise, self.at, self.rates, self.traces = noise, [], [], []

    def on_train_start(self, trainer, pl_module):
        self.at.append(flat(pl_module.backbone))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.traces.append(self.noise.latest.trace if self.noise else None)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.at.append(flat(pl_module.backbone))


def watched_by(path, module):
    optimizer = module.trainer.optimizers[0]
    hooks = [*optimizer._optimizer_step_pre_hooks.values()]
    hooks += optimizer._optimizer_step_post_hooks.values()
    return any(getattr(hook, "__self__", None) is path for hook in hooks)


def flat(module):
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def scheduled(cls):
    """The module with warm-up and cosine."""

    class Scheduled(cls):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            rate = lambda k: min(1.0, (k + 1) / 3) * (1 + math.cos(math.pi * k / 10)) / 2  # noqa: E731
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
            }

    return Scheduled


@pytest.mark.parametrize("nesterov", [False, True])
def test_every_number_is_that_of_its_definition(tiny, fit, nesterov):
    noise, path = GradientNoise(every=3), PathLength()
    seen = Positions(noise)
    module = scheduled(tiny)(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=1e-3)
    )
    rows = fit(module, noise, path, seen, max_steps=8, max_epochs=-1)

    rules = [sgd_rule(lr, momentum=0.9, nesterov=nesterov) for lr in seen.rates]
    w = effective_steps(rules)
    x = torch.stack(seen.at)
    away = (x - x[0]).norm(dim=1)
    expected = {
        "travel": float(w.sum()),
        "travel_squared": float(w.square().sum()),
        "path_length": float((x[1:] - x[:-1]).norm(dim=1).sum()),
        "displacement": float(away[-1]),
        "mean_squared_displacement": float((w * away[:-1].square()).sum() / w.sum()),
        "eps_path": eps_path(w.tolist(), seen.traces, n=48, batch=8),
    }
    assert path.card_facts() == pytest.approx(expected, rel=1e-5)
    last = rows[-1]
    assert last["path/length"] == pytest.approx(expected["path_length"], rel=1e-5)
    assert last["path/eps"] == pytest.approx(expected["eps_path"], rel=1e-6)
    assert last["path/travel"] == pytest.approx(expected["travel"], rel=1e-9)
    assert last["path/head_displacement"] > 0
    assert "path/decayed_share" not in last


def test_constant_momentum_gives_the_closed_form(tiny, fit):
    from mergekit_lit.theory.travel import step_l1, step_l2_squared

    path = PathLength()
    fit(tiny(), path, max_steps=12, max_epochs=-1, accumulate_grad_batches=2)
    facts = path.card_facts()
    assert facts["travel"] == pytest.approx(0.1 * step_l1(12, momentum=0.9))
    assert facts["travel_squared"] == pytest.approx(0.01 * step_l2_squared(12, momentum=0.9))
    assert facts["eps_path"] is None


def test_adaptive_optimizers_have_no_travel(tiny, fit):
    noise, path, seen = GradientNoise(), PathLength(), Positions()
    module = tiny(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    rows = fit(module, noise, path, seen, max_steps=5)
    facts = path.card_facts()
    assert facts["travel"] is facts["travel_squared"] is facts["eps_path"] is None
    away = (torch.stack(seen.at) - seen.at[0]).norm(dim=1)
    assert facts["displacement"] == pytest.approx(float(away[-1]), rel=1e-5)
    mean = float(away[:-1].square().mean())
    assert facts["mean_squared_displacement"] == pytest.approx(mean, rel=1e-5)
    assert rows[-1]["path/decayed_share"] == pytest.approx(1 - (1 - 1e-3) ** 5)
    assert "path/travel" not in rows[-1]


def test_groups_that_move_at_different_rates_have_no_common_travel(tiny, fit):
    def optimizer(parameters):
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.2}, {"params": rest}], lr=0.1)

    path = PathLength()
    fit(tiny(optimizer), path, max_steps=2)
    assert path.card_facts()["travel"] is None
    assert path.card_facts()["path_length"] > 0


def test_steps_that_the_scaler_skips_do_not_count(tiny, fit):
    module = tiny(loss_scale=lambda index: math.inf if index == 1 else 1.0)
    path = PathLength()
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
    fit(module, path, max_steps=4, plugins=plugins)
    assert path.card_facts()["travel"] == pytest.approx(0.1 * (1 + 1.9 + 2.71))


def test_a_frozen_head_leaves_the_rest_out(tiny, fit):
    module = tiny()
    module.head.requires_grad_(requires_grad=False)
    rows = fit(module, PathLength(), max_steps=2)
    assert "path/head_displacement" not in rows[-1]


def test_the_optimizer_is_left_as_it_was(tiny, fit):
    path, module = PathLength(), tiny()
    fit(module, path, max_steps=2)
    assert not watched_by(path, module)

    class Fails(tiny):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("stop")

    module = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, path, max_steps=2)
    assert not watched_by(path, module)
