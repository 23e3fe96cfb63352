import copy
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from mergekit_lit.callbacks import GradientNoise
from mergekit_lit.theory.noise import GradientMoments, moments_of


def sample_gradients(module, data):
    """Per-sample gradients (n, P) in eval mode, as the estimator sees them."""
    module = copy.deepcopy(module).eval()
    module.log = lambda *_, **__: None
    rows = []
    for x, y in DataLoader(data.dataset, batch_size=1):
        loss = module.training_step((x, y), 0)
        parts = torch.autograd.grad(loss, list(module.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(rows)


def test_estimates_average_to_the_noise_of_the_data(tiny, images, fit):
    """At a learning rate of 0 each estimate is of one point, where everything is known."""
    module = tiny(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    data = images(24, 8)
    gradients = sample_gradients(module, data)
    for part in module.modules():
        part.momentum = 0.0  # BatchNorm keeps its statistics, so the point stays the same
    callback = GradientNoise(every=1, seed=3)
    rows = fit(module, callback, data=data, max_steps=100, max_epochs=-1)
    for metric, expected in (
        ("noise/trace", float(gradients.var(0, correction=0).sum())),
        ("noise/signal", float(gradients.mean(0).square().sum())),
    ):
        values = np.array([row[metric] for row in rows])
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - expected) < 4 * error, metric
    mean = np.mean([row["noise/trace"] for row in rows])
    assert callback.card_facts() == {
        "gradient_noise": pytest.approx(mean),
        "noise_estimates": 100,
    }


def test_an_estimate_is_that_of_its_micro_batches(tiny, images, fit):
    module, data = tiny(), images(32, 8)
    gradients = sample_gradients(module, data)
    callback = GradientNoise(every=50)
    rows = fit(module, callback, data=data, max_steps=1)
    from mergekit_lit.core.seeds import generator

    picked = torch.randperm(32, generator=generator(0, "noise", 0))[:8].view(4, 2)
    means = [[gradients[part].mean(0)] for part in picked]
    expected = moments_of(means, batch=2, population=32)
    assert rows[0]["noise/trace"] == pytest.approx(expected.trace, rel=1e-4)
    assert rows[0]["noise/signal"] == pytest.approx(expected.signal, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_estimates_before_every_so_many_steps(tiny, fit, accumulate):
    seen = []

    class Watched(GradientNoise):
        def _estimate(self, trainer, module):
            seen.append(trainer.global_step)
            return super()._estimate(trainer, module)

    fit(tiny(), Watched(every=3), max_steps=8, max_epochs=-1, accumulate_grad_batches=accumulate)
    assert seen == [0, 1, 3, 6]


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (50, 20, [0, 1, 3, 9]),
        (50, 200, [0, 1, 3, 9, 27, 50, 100, 150]),
        (10, 40, [0, 1, 3, 9, 10, 20, 30]),
        (1, 4, [0, 1, 2, 3]),
    ],
)
def test_short_runs_rest_on_several_estimates(tiny, fit, monkeypatch, every, steps, expected):
    """The card tells the mean over the steps, each under the estimate before it, and their number.

    Which steps are chosen does not depend on the length: several K share one trajectory.
    """
    seen = []

    def counted(_self, trainer, _module):
        seen.append(trainer.global_step)
        return GradientMoments(trace=float(1 + trainer.global_step), signal=1.0)

    monkeypatch.setattr(GradientNoise, "_estimate", counted)
    callback = GradientNoise(every=every)
    fit(tiny(), callback, max_steps=steps, max_epochs=-1)
    assert seen == expected
    traces = [1 + max(s for s in seen if s <= step) for step in range(steps)]
    assert callback.card_facts() == {
        "gradient_noise": pytest.approx(sum(traces) / steps),
        "noise_estimates": len(seen),
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_training_does_not_notice(tiny, fit, accumulate):
    """Weights, BatchNorm statistics, dropout masks, metrics and random states stay the same."""

    class Counting(tiny):
        def __init__(self):
            super().__init__(dropout=0.5)
            self.seen, self.losses, self.total = 0, [], torch.zeros(())

        def training_step(self, batch, batch_idx):
            self.seen += 1
            loss = super().training_step(batch, batch_idx)
            self.losses.append(float(loss.detach()))
            self.total += loss.detach()
            np.random.rand()  # noqa: NPY002 (the global state is what is watched)
            random.random()
            return loss

    def run(*callbacks):
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        random.seed(7)
        module = Counting()
        arguments = {"max_steps": 5, "max_epochs": -1, "accumulate_grad_batches": accumulate}
        rows = fit(module, *callbacks, **arguments)
        states = (torch.rand(1).item(), np.random.rand(), random.random())  # noqa: NPY002
        return module, [row["train/loss"] for row in rows], states

    plain, losses, states = run()
    watched, same_losses, same_states = run(GradientNoise(every=2))
    assert losses == same_losses
    assert states == same_states
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    assert (plain.seen, plain.losses) == (watched.seen, watched.losses)
    assert torch.equal(plain.total, watched.total)
    assert watched.training
    assert all(part.training for part in watched.modules())
    assert "log" not in vars(watched)


def test_on_the_cpu_no_state_of_cuda_is_touched(tiny, fit, monkeypatch):
    """`torch.manual_seed` would queue a call, with its traceback, for devices never used."""
    monkeypatch.setattr("torch.cuda._lazy_call", lambda *_, **__: pytest.fail("touched CUDA"))
    fit(tiny(), GradientNoise(every=2), max_steps=3)


def test_data_that_can_only_be_iterated_over_serves_by_its_batches(tiny, images, fit):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(images(40, 8).dataset)

    callback = GradientNoise(every=2, micro_batches=3)
    rows = fit(tiny(), callback, data=DataLoader(Stream(), batch_size=8), max_steps=5)
    assert [("noise/trace" in row) for row in rows] == [False, False, False, True, True]
    assert rows[4]["noise/trace"] > 0


def test_fp16_estimates_agree_with_float32(tiny, fit):
    from lightning.pytorch.plugins.precision import MixedPrecision

    exact = fit(tiny(), GradientNoise(), max_steps=1)
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    half = fit(tiny(), GradientNoise(), max_steps=1, plugins=plugins)
    assert half[0]["noise/trace"] == pytest.approx(exact[0]["noise/trace"], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "`every` must be at least 1, but is 0"),
        ({"micro_batches": 1}, "`micro_batches` must be at least 2, but is 1"),
        ({"decay": 1.0}, r"`decay` must lie in \[0, 1\), but is 1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientNoise(**arguments)


def test_too_few_samples_are_refused(tiny, images, fit):
    with pytest.raises(ValueError, match="at least 4 training samples"):
        fit(tiny(), GradientNoise(), data=images(3, 3), max_steps=1)
