"""What the network sees: normalised, resized, augmented."""

import numpy as np
import pytest
import torch

from mergekit_lit.data.transforms import AUGMENTATIONS, augment, to_input

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)


def make_batch(b=6, side=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, side, side, 3), generator=draw, dtype=torch.uint8)


def test_input_is_normalised_by_channel():
    x = make_batch()
    expected = (x.numpy() / 255 - np.array(MEAN)) / np.array(STD)
    out = to_input(x, mean=MEAN, std=STD, size=16)
    assert out.is_contiguous()
    np.testing.assert_allclose(out.permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-5)


def test_input_is_resized_with_antialiasing():
    x = torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    x[:, ::2] = 0
    small = to_input(x, mean=(0, 0, 0), std=(1, 1, 1), size=4)
    assert small.shape == (1, 3, 4, 4)
    # Without antialiasing, stripes of one pixel would survive as 0 and 1.
    assert (small - 0.5).abs().max() < 0.2
    assert to_input(make_batch(), mean=MEAN, std=STD, size=24).shape == (6, 3, 24, 24)


def test_half_precision_is_the_rounded_float():
    x = make_batch()
    full = to_input(x, mean=MEAN, std=STD, size=32)
    half = to_input(x, mean=MEAN, std=STD, size=32, dtype=torch.bfloat16)
    assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize("bad", [make_batch().float(), make_batch()[0], make_batch()[..., :1]])
def test_other_than_uint8_images_are_refused(bad):
    with pytest.raises(ValueError, match="`x` must be uint8"):
        to_input(bad, mean=MEAN, std=STD, size=16)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_seeded_and_leaves_its_input(name):
    x = make_batch()
    before = x.clone()
    first, again, other = (augment(x, name, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(x, before)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "none")
    assert (first.shape, first.dtype) == (x.shape, x.dtype)


def test_flips_are_whole_images():
    x = make_batch(64)
    out = augment(x, "flip", torch.Generator().manual_seed(0))
    flipped = [torch.equal(a, b.flip(1)) for a, b in zip(out, x, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(out, x, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 16 < sum(flipped) < 48


def test_crops_shift_by_at_most_an_eighth():
    x = make_batch(64)
    out = augment(x, "crop", torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (0, 0, 2, 2, 2, 2))
    shifts = set()
    for image, source in zip(out, padded, strict=True):
        found = [
            (r, c)
            for r in range(5)
            for c in range(5)
            if torch.equal(image, source[r : r + 16, c : c + 16])
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 15


def test_an_unknown_augmentation_is_named():
    with pytest.raises(KeyError, match="Did you mean 'flip'"):
        augment(make_batch(), "flipp", torch.Generator())
