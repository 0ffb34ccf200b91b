"""Batched crop and flip against torchvision's, one image at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from torchvision.transforms import RandomCrop
from torchvision.transforms.functional import crop, hflip, pad

from third_party.augment import crop_and_flip, random_crop_and_flip

CELLS = list(product(range(9), range(9), (False, True)))  # top, left, flip


def numbered_image(size: int = 10) -> torch.Tensor:
    """No pixel is zero and none repeats within a channel, so a crop shows where it came from."""
    return torch.arange(1, 3 * size * size + 1).remainder(251).add(1).view(3, size, size).to(torch.uint8)


def test_each_of_the_162_views_is_torchvisions() -> None:
    image = numbered_image()
    top, left, flip = (torch.tensor(values) for values in zip(*CELLS, strict=True))
    views = crop_and_flip(image.expand(len(CELLS), -1, -1, -1), top, left, flip, padding=4)
    for view, (row, column, mirrored) in zip(views, CELLS, strict=True):
        expected = crop(pad(image, [4]), row, column, 10, 10)
        assert torch.equal(view, hflip(expected) if mirrored else expected)


def test_torchvision_draws_from_the_same_81_crops() -> None:
    draws = {RandomCrop.get_params(torch.empty(3, 18, 18), (10, 10))[:2] for _ in range(2000)}
    assert draws == {(row, column) for row, column, mirrored in CELLS if mirrored}


def test_all_views_are_equally_likely() -> None:
    image = numbered_image(size=5)
    top, left, flip = (torch.tensor(values) for values in zip(*CELLS, strict=True))
    views = crop_and_flip(image.expand(len(CELLS), -1, -1, -1), top, left, flip, padding=4).reshape(len(CELLS), -1)
    distinct, cell_of = views.unique(dim=0, return_inverse=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = random_crop_and_flip(image.expand(20_000, -1, -1, -1)).reshape(20_000, -1)
    found, counts = drawn.unique(dim=0, return_counts=True)
    assert torch.equal(found, distinct)
    expected = cell_of.bincount().double() * 20_000 / len(CELLS)
    assert chisquare(counts.double().numpy(), expected.numpy()).pvalue > 0.001


def test_flip_and_crop_can_be_switched_off() -> None:
    images = numbered_image().expand(200, -1, -1, -1)
    assert torch.equal(random_crop_and_flip(images, padding=0, flip=False), images)
    only_flipped = random_crop_and_flip(images, padding=0)
    assert only_flipped.unique(dim=0).shape[0] == 2
    unflipped = {
        bytes(crop(pad(images[0], [1]), r, c, 10, 10).numpy().tobytes()) for r, c in product(range(3), range(3))
    }
    drawn = {view.contiguous().numpy().tobytes() for view in random_crop_and_flip(images, padding=1, flip=False)}
    assert drawn == unflipped


@pytest.mark.parametrize("shape", [(3, 3, 8, 12), (2, 3, 5, 4)])
def test_any_image_shape_keeps_its_shape_and_type(shape: tuple[int, ...]) -> None:
    images = torch.full(shape, 9, dtype=torch.uint8)
    views = random_crop_and_flip(images)
    assert views.shape == shape
    assert views.dtype == torch.uint8
    assert images.eq(9).all()
