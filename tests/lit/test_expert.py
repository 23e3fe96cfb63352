import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_lit.core.params import content_hash
from mergekit_lit.core.seeds import derive_seed
from mergekit_lit.data.batches import StepLoader
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.passes import inputs, statistics_of
from mergekit_lit.models.backbones import load_base

RESNET, VIT = "timm/test_resnet@random:0", "vit@random:0"


def make_module(base=VIT, **changes):
    options = {"image_size": 8, "lr": 0.01, "schedule": "constant", "warmup_steps": 0}
    return ExpertModule(base, **{**options, **changes})


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def bare_loop(module, data, *, steps, optimizer, smoothing=0.0, rate=lambda _: 1.0):
    """Train the way a textbook does, from the module's own starting point."""
    backbone, _ = load_base(module.hparams.base, image_size=8)
    backbone.load_state_dict({**backbone.state_dict(), **statistics_of(backbone, data.train)})
    backbone.train()
    made = optimizer(backbone.parameters())
    peak = made.param_groups[0]["lr"]
    for step, (x, y, _) in enumerate(StepLoader(data.train, batch=12, steps=steps, seed=0)):
        for group in made.param_groups:
            group["lr"] = peak * rate(step)
        loss = cross_entropy(
            module.head(backbone(inputs(backbone, x))), y, label_smoothing=smoothing
        )
        made.zero_grad()
        loss.backward()
        made.step()
    return backbone.state_dict()


@pytest.mark.parametrize("base", [RESNET, VIT])
def test_equals_a_bare_loop(base, fit, dots):
    data = dots()
    module = fit(
        make_module(base, momentum=0.8, weight_decay=0.1, label_smoothing=0.2, schedule="linear"),
        data,
        steps=4,
    )
    expected = bare_loop(
        module,
        data.task_data,
        steps=4,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8, weight_decay=0.1),
        smoothing=0.2,
        rate=lambda step: 1 - step / 4,
    )
    for name, tensor in module.backbone.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adaptive_optimizers_equal_a_bare_loop(optimizer, fit, dots):
    data = dots()
    module = fit(make_module(optimizer=optimizer, lr=1e-3, weight_decay=0.1), data)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    expected = bare_loop(
        module,
        data.task_data,
        steps=3,
        optimizer=lambda p: kind(p, lr=1e-3, weight_decay=0.1),
    )
    for name, tensor in module.backbone.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_accumulated_micro_batches_make_one_step(fit, dots):
    whole = fit(make_module(RESNET, norm_statistics="frozen"), dots(batch=24))
    parts = fit(
        make_module(RESNET, norm_statistics="frozen"),
        dots(batch=12),
        accumulate_grad_batches=2,
    )
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, parts.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_frozen_statistics_are_those_of_the_head_fit(fit, dots):
    data = dots()
    module = fit(make_module(RESNET, norm_statistics="frozen"), data)
    start, _ = load_base(RESNET, image_size=8)
    expected = statistics_of(start, data.task_data.train)
    state = module.backbone.state_dict()
    assert expected
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    module.train()
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    assert not any(layer.training for layer in layers)
    # Their scale and shift are trained all the same.
    assert not torch.equal(state["bn1.weight"], start.state_dict()["bn1.weight"])


@pytest.mark.parametrize("head", ["frozen-ncm", "frozen-probe", "trained"])
def test_only_a_trained_head_moves(head, fit, dots):
    class Start(Callback):
        def on_fit_start(self, _, pl_module):
            self.head = {n: t.detach().clone() for n, t in pl_module.head.state_dict().items()}

    start = Start()
    module = fit(make_module(head=head), dots(), callbacks=[start])
    moved = not torch.equal(start.head["weight"], module.head.weight)
    assert moved == (head == "trained")
    assert module.head.weight.requires_grad == (head == "trained")


def test_class_embeddings_make_a_frozen_head(tmp_path, fit, dots):
    from safetensors.torch import save_file

    module = make_module()
    features = module.backbone.features
    save_file({"embeddings": torch.eye(3, features)}, tmp_path / "names.safetensors")
    module = fit(make_module(head=f"embeddings:{tmp_path}/names.safetensors"), dots())
    assert module.head_kind == "embeddings"
    assert torch.equal(module.head.weight, torch.eye(3, features))


def test_a_second_fit_starts_from_the_base_again(fit, dots):
    module, data = make_module(), dots()
    first = content_hash(weights(fit(module, data)))
    assert content_hash(weights(fit(module, data))) == first


def test_seed_decides_the_order(fit, dots):
    hashes = [content_hash(weights(fit(make_module(seed=seed), dots()))) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_forward_passes_are_reseeded_by_step_and_slot(fit, dots):
    class Watch(Callback):
        def __init__(self):
            self.seeds, self.positions = [], []

        def on_before_backward(self, *_):
            self.seeds.append(torch.initial_seed())

        def on_train_batch_start(self, _, __, batch, *___):
            self.positions.append(batch[2])

    watch = Watch()
    fit(
        make_module(seed=5),
        dots(),
        steps=2,
        callbacks=[watch],
        accumulate_grad_batches=2,
    )
    slots = [(step, slot) for step in (0, 1) for slot in (0, 1)]
    assert watch.seeds == [derive_seed(5, "forward", *slot) for slot in slots]
    assert len(torch.cat(watch.positions).unique()) == 4 * 12


def test_augmentation_is_keyed_by_step_and_slot(dots):
    data = dots(augment="crop-flip")
    data.setup()
    x = torch.from_numpy(data.task_data.train.x[:12])
    once = data.augmented(x, 3, 0, seed=1)
    assert torch.equal(once, data.augmented(x, 3, 0, seed=1))
    assert not torch.equal(once, data.augmented(x, 4, 0, seed=1))
    assert not torch.equal(once, x)


def test_compiles(monkeypatch, fit, dots):
    from mergekit_lit.models.backbones import Backbone

    compiled = []
    monkeypatch.setattr(Backbone, "compile", lambda module: compiled.extend([module]))
    module = fit(make_module(compile=True), dots())
    assert compiled == [module.backbone]


def test_validates_when_asked(fit, dots, quiet_trainer):
    module, data = make_module(), dots()
    fit(module, data)
    trainer = quiet_trainer()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        (found,) = trainer.validate(module, datamodule=data, verbose=False)
    val = data.task_data.val
    x, y = torch.from_numpy(val.x), torch.from_numpy(val.y)
    with torch.no_grad():
        logits = module.eval()(x)
    assert found["val/loss"] == pytest.approx(float(cross_entropy(logits, y)))
    assert found["val/accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "frozen-nmc"}, KeyError, "No head named 'frozen-nmc'. Did you mean 'frozen-ncm'"),
        ({"label_smoothing": 1.0}, ValueError, r"`label_smoothing` must lie in \[0, 1\)"),
        ({"norm_statistics": "eval"}, ValueError, "No norm_statistics named 'eval'"),
        ({"lr": -1.0}, ValueError, "`lr` must be positive"),
        ({"base": "rsenet"}, KeyError, "Did you mean 'resnet'"),
    ],
)
def test_refuses_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ExpertModule(**options)


def test_a_run_that_diverges_says_so_in_one_line(fit, dots):
    with pytest.raises(
        ValueError, match=r"The loss must be finite, but is .* of task 'dots'\. .*`lr`"
    ):
        fit(make_module(lr=1e30), dots(), steps=4, log_every_n_steps=1)


def test_needs_a_number_of_steps(fit, dots):
    with pytest.raises(ValueError, match="`max_steps` must be the number of steps K"):
        fit(make_module(), dots(), steps=-1, max_epochs=1)
