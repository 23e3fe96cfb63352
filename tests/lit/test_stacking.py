"""One pass through stacked networks: the losses, gradients and statistics of one pass each."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mergekit_lit.lit.stacking import stacked_losses
from mergekit_lit.models.backbones import load_base


def networks(first, count=3):
    """Copies of a network with weights of their own."""
    draw = torch.Generator().manual_seed(0)
    made = [copy.deepcopy(first) for _ in range(count)]
    for network in made:
        for parameter in network.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=draw)
    return made


def batches(count=3, size=16):
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(count, 6, 3, size, size, generator=draw)
    return images, torch.randint(4, (count, 6), generator=draw)


def network_of(spec):
    backbone, _ = load_base(spec, image_size=16)
    head = nn.Linear(backbone.features, 4)
    head.bias.requires_grad_(requires_grad=False)
    return nn.Sequential(backbone, head).train()


@pytest.mark.parametrize("spec", ["timm/test_resnet@random:0", "vit@random:0"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_one_pass_each(spec, training):
    apart = networks(network_of(spec).train(training))
    stacked = copy.deepcopy(apart)
    images, labels = batches()
    losses = stacked_losses(stacked, images, labels, label_smoothing=0.1)
    for place, (alone, other) in enumerate(zip(apart, stacked, strict=True)):
        loss = cross_entropy(alone(images[place]), labels[place], label_smoothing=0.1)
        torch.testing.assert_close(losses[place], loss, rtol=1e-5, atol=1e-6)
        (loss / 2).backward()
        (losses[place] / 2).backward()
        for expected, found in zip(alone.parameters(), other.parameters(), strict=True):
            assert (expected.grad is None) == (found.grad is None)
            if expected.grad is not None:
                near = {"rtol": 1e-4, "atol": 1e-5 * float(expected.grad.abs().max())}
                torch.testing.assert_close(found.grad, expected.grad, **near)
        for expected, found in zip(alone.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_add_up_over_passes():
    (one, _) = made = networks(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), 2)
    images, labels = batches(2, size=2)
    for _ in range(2):
        stacked_losses(made, images, labels)[0].backward()
    (expected,) = torch.autograd.grad(2 * cross_entropy(one(images[0]), labels[0]), [one[1].weight])
    torch.testing.assert_close(one[1].weight.grad, expected)
    assert made[1][1].weight.grad is None


def test_what_draws_at_random_is_refused():
    layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 4))
    images, labels = batches(2, size=2)
    with pytest.raises(RuntimeError, match="random"):
        stacked_losses(networks(layers, 2), images, labels)
    assert len(stacked_losses([net.eval() for net in networks(layers, 2)], images, labels)) == 2
