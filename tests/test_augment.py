"""Batched crop and flip against torchvision's, one image at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import InterpolationMode, RandomCrop, RandomResizedCrop
from torchvision.transforms import functional as tv
from torchvision.transforms.functional import crop, hflip, pad

from third_party.augment import Augmentation, augment, crop_and_flip, random_boxes, resized_crop, rotate

CELLS = list(product(range(9), range(9), (False, True)))  # top, left, flip


def numbered_image(size: int = 10) -> torch.Tensor:
    """No pixel is zero and none repeats within a channel, so a crop shows where it came from."""
    return torch.arange(1, 3 * size * size + 1).remainder(251).add(1).view(3, size, size).to(torch.uint8)


@pytest.mark.parametrize("size", [10, 40])  # large images go another way on the CPU
def test_each_of_the_162_views_is_torchvisions(size: int) -> None:
    image = numbered_image(size)
    top, left, flip = (torch.tensor(values) for values in zip(*CELLS, strict=True))
    views = crop_and_flip(image.expand(len(CELLS), -1, -1, -1), top, left, flip, padding=4)
    for view, (row, column, mirrored) in zip(views, CELLS, strict=True):
        expected = crop(pad(image, [4]), row, column, size, size)
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
        drawn = augment(image.expand(20_000, -1, -1, -1), Augmentation()).reshape(20_000, -1)
    found, counts = drawn.unique(dim=0, return_counts=True)
    assert torch.equal(found, distinct)
    expected = cell_of.bincount().double() * 20_000 / len(CELLS)
    assert chisquare(counts.double().numpy(), expected.numpy()).pvalue > 0.001


def test_flip_and_crop_can_be_switched_off() -> None:
    images = numbered_image().expand(200, -1, -1, -1)
    assert torch.equal(augment(images, Augmentation(crop_padding=0, flip=False)), images)
    only_flipped = augment(images, Augmentation(crop_padding=0))
    assert only_flipped.unique(dim=0).shape[0] == 2
    unflipped = {
        bytes(crop(pad(images[0], [1]), r, c, 10, 10).numpy().tobytes()) for r, c in product(range(3), range(3))
    }
    drawn = {view.contiguous().numpy().tobytes() for view in augment(images, Augmentation(crop_padding=1, flip=False))}
    assert drawn == unflipped


@pytest.mark.parametrize("shape", [(3, 3, 8, 12), (2, 3, 5, 4)])
def test_any_image_shape_keeps_its_shape_and_type(shape: tuple[int, ...]) -> None:
    images = torch.full(shape, 9, dtype=torch.uint8)
    views = augment(images, Augmentation())
    assert views.shape == shape
    assert views.dtype == torch.uint8
    assert images.eq(9).all()


# ---- random resized crop ----


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24), (20, 70)])
def test_boxes_are_drawn_as_torchvision_draws_them(height: int, width: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        left, top, columns, rows = random_boxes(4000, height, width, 0.08, torch.device("cpu")).T.double().numpy()
        image = torch.empty(3, height, width)
        theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    other_top, other_left, other_rows, other_columns = torch.tensor(theirs).double().T.numpy()
    assert min(left.min(), top.min()) >= 0
    assert (left + columns).max() <= width
    assert (top + rows).max() <= height
    for mine, other in (
        (left, other_left),
        (top, other_top),
        (columns, other_columns),
        (rows, other_rows),
        (rows * columns, other_rows * other_columns),
        (columns / rows, other_columns / other_rows),
        (left / (width - columns + 1), other_left / (width - other_columns + 1)),
    ):
        assert ks_2samp(mine, other).pvalue > 1e-3


@pytest.mark.parametrize("size", [(16, 16), (24, 20), (48, 64)])  # smaller and larger than the boxes
def test_a_resized_crop_is_torchvisions_with_antialiasing(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    boxes = torch.tensor([[0, 0, 40, 32], [3, 5, 11, 7], [20, 1, 20, 31], [39, 31, 1, 1]]).float()
    flip = torch.tensor([False, True, False, True])
    views = resized_crop(images, boxes, *size, flip)
    for view, image, box, mirrored in zip(views, images, boxes.int().tolist(), flip, strict=True):
        left, top, columns, rows = box
        expected = tv.resized_crop(
            image.float(), top, left, rows, columns, list(size), InterpolationMode.BILINEAR, antialias=True
        )
        assert torch.allclose(view, hflip(expected) if mirrored else expected, atol=0.01)


def test_random_resized_crops_of_the_whole_image_leave_it_as_it_is() -> None:
    images = numbered_image().expand(20, -1, -1, -1)
    views = augment(images, Augmentation(smallest_crop=0.9999, flip=False))
    assert views.dtype == torch.uint8
    assert torch.equal(views, images)
    assert augment(images, Augmentation(smallest_crop=0.5, crop=6)).shape == (20, 3, 6, 6)


def test_a_smaller_crop_lies_anywhere_in_the_image() -> None:
    image = numbered_image()
    views = augment(image.expand(400, -1, -1, -1), Augmentation(crop_padding=0, crop=8, flip=False))
    expected = {bytes(crop(image, r, c, 8, 8).numpy().tobytes()) for r, c in product(range(3), range(3))}
    assert {view.contiguous().numpy().tobytes() for view in views} == expected
    with pytest.raises(ValueError, match="crop: expected at most the side of the images, 10, got 11"):
        augment(image[None], Augmentation(crop=11))


# ---- rotation ----


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 9, 14)])
def test_a_rotation_is_torchvisions(shape: tuple[int, ...]) -> None:
    image = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    degrees = torch.tensor([-15.0, -3.3, 0.0, 7.1, 15.0, 45.0])
    views = rotate(image.expand(len(degrees), -1, -1, -1), degrees)
    for view, angle in zip(views, degrees.tolist(), strict=True):
        expected = tv.rotate(image, angle, InterpolationMode.NEAREST)
        assert (view != expected).float().mean() < 0.01  # a tie of two pixels may fall either way


def test_rotations_are_uniform_up_to_the_largest_angle() -> None:
    dot = torch.zeros(1, 1, 401, 401, dtype=torch.uint8)
    dot[..., 199:202, 398:401] = 1  # a dot, 199 from the centre: its row tells the angle
    with torch.random.fork_rng():
        torch.manual_seed(0)
        views = augment(dot.expand(600, -1, -1, -1), Augmentation(crop_padding=0, flip=False, rotation=15.0))
    rows = torch.stack([view[0].nonzero().double().mean(dim=0)[0] for view in views])
    angles = torch.rad2deg(torch.asin((200 - rows) / 199)).numpy()
    assert abs(angles).max() < 15.5
    drawn = torch.empty(600, dtype=torch.float64).uniform_(-15, 15, generator=torch.Generator().manual_seed(1)).numpy()
    assert ks_2samp(angles, drawn).pvalue > 1e-3
