"""Random crops, mirrorings and rotations of a whole batch at once, on the device that holds it.

In distribution equal to torchvision's transforms, one image at a time, in this order: RandomCrop or RandomResizedCrop,
RandomHorizontalFlip, RandomRotation. Letters in shapes: B images, H x W pixels, h x w pixels of a view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Places = slice | Tensor
"""Which rows of a batch are meant."""

EVERY = slice(None)


@dataclass(frozen=True)
class Augmentation:
    """What happens to the images of a batch; the defaults are those of the methods on CIFAR."""

    crop_padding: int = 4  # pixels of black at every side, before a crop of the size of the image; 0 switches it off
    crop: int = 0  # side of the views, in pixels, less than the images'; 0: that of the images
    smallest_crop: float = 1.0  # below 1: crops of a random shape and share of the area, at least this, are resized
    flip: bool = True  # mirror half of the images; digits and letters must not be
    rotation: float = 0.0  # largest angle, in degrees

    @property
    def is_random(self) -> bool:
        """Whether the views of an image differ."""
        return bool(self.crop_padding or self.crop or self.smallest_crop < 1 or self.flip or self.rotation)


def augment(images: Tensor, how: Augmentation, *, of: int | None = None, places: Places = EVERY) -> Tensor:
    """Draw a view of each image.

    Args:
        images: (B, 3, H, W) uint8, before normalisation, so that what lies outside is black as in torchvision.
        how: What happens to them.
        of: Rows of the batch that the images are a part of, where several processes share it; None is all of it.
        places: Where in that batch they stand; all processes draw for the whole of it.

    Returns:
        (B, 3, h, w) uint8. The draws come from the default generator of the device.

    Raises:
        ValueError: The views are larger than the images.
    """
    count, device = len(images) if of is None else of, images.device
    height, width = images.shape[2:]
    rows, columns = (how.crop, how.crop) if how.crop else (height, width)
    if how.crop > min(height, width):
        raise ValueError(f"crop: expected at most the side of the images, {min(height, width)}, got {how.crop}")
    if how.smallest_crop < 1:
        boxes = random_boxes(count, height, width, how.smallest_crop, device)[places]
        mirrored = _mirrored(count, how.flip, device)[places]
        images = resized_crop(images, boxes, rows, columns, mirrored).round_().clamp_(0, 255).to(torch.uint8)
    elif how.crop_padding or how.crop or how.flip:
        top, left = (
            torch.randint(0, spare + 2 * how.crop_padding + 1, (count,), device=device)[places]
            for spare in (height - rows, width - columns)
        )
        mirrored = _mirrored(count, how.flip, device)[places]
        images = crop_and_flip(images, top, left, mirrored, how.crop_padding, (rows, columns))
    if how.rotation:
        images = rotate(images, torch.empty(count, device=device).uniform_(-how.rotation, how.rotation)[places])
    return images


def _mirrored(count: int, flip: bool, device: torch.device) -> Tensor:
    return torch.rand(count, device=device) < (0.5 if flip else 0.0)


def crop_and_flip(
    images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int, size: tuple[int, int] | None = None
) -> Tensor:
    """Crop each image out of its zero-padded self and mirror the chosen ones.

    Args:
        images: (B, 3, H, W).
        top: First row of each crop in the padded image, (B,) integers in [0, H + 2 * padding - h].
        left: First column, (B,) likewise.
        flip: Which crops to mirror, (B,) bool.
        padding: Zeros added at every side.
        size: h and w; None is the size of the images.

    Returns:
        (B, 3, h, w) of the same type, stored channels last.

    Example:
        >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
        >>> crop_and_flip(image, torch.tensor([2]), torch.tensor([1]), torch.tensor([True]), padding=1)
        tensor([[[[4, 3],
                  [0, 0]]]])
    """
    count, device = len(images), images.device
    height, width = size or (images.shape[2], images.shape[3])
    if device.type == "cpu" and height * width > 1024:  # copies of whole rows are ten times as fast there
        views = images.new_zeros(count, height, width, images.shape[1])
        places = zip((top - padding).tolist(), (left - padding).tolist(), flip.tolist(), strict=True)
        for view, image, (first, start, mirrored) in zip(views, images.permute(0, 2, 3, 1), places, strict=True):
            end, stop = min(first + height, image.shape[0]), min(start + width, image.shape[1])
            target = view[max(-first, 0) : end - first, max(-start, 0) : stop - start]
            target.copy_(image[max(first, 0) : end, max(start, 0) : stop])
            if mirrored:
                view.copy_(view.flip(1))
        return views.permute(0, 3, 1, 2)
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # (B, H + 2 padding, W + 2 padding, 3)
    rows = top[:, None] + torch.arange(height, device=device)  # (B, h)
    columns = torch.arange(width, device=device).expand(count, width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)  # (B, w)
    images_index = torch.arange(count, device=device)[:, None, None]
    return padded[images_index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_boxes(count: int, height: int, width: int, smallest: float, device: torch.device) -> Tensor:
    """Crops as torchvision's RandomResizedCrop draws them: of a random area and shape, redrawn while they do not fit.

    After ten draws that do not fit it is the centre, as large as the proportions allow.

    Args:
        count: B.
        height: H.
        width: W.
        smallest: Least share of the area.
        device: Where they are drawn.

    Returns:
        Left, top, width and height, (B, 4) float32 of whole numbers.
    """
    narrowest, widest = 3 / 4, 4 / 3
    area = height * width * torch.empty(count, 10, device=device).uniform_(smallest, 1)
    ratio = torch.empty(count, 10, device=device).uniform_(math.log(narrowest), math.log(widest)).exp()
    sizes = torch.stack([(area * ratio).sqrt().round(), (area / ratio).sqrt().round()], dim=2)  # (B, 10, 2)
    room = torch.tensor([width, height], device=device)
    fitting = ((sizes > 0) & (sizes <= room)).all(dim=2)
    size = sizes[torch.arange(count, device=device), fitting.int().argmax(dim=1)]  # the first that fits
    proportions = min(max(width / height, narrowest), widest)
    whole = torch.tensor([min(width, round(height * proportions)), min(height, round(width / proportions))])
    fits = fitting.any(dim=1, keepdim=True)
    size = torch.where(fits, size, whole.to(size))
    drawn = (torch.rand(count, 2, device=device) * (room - size + 1)).floor().minimum(room - size)
    return torch.cat([torch.where(fits, drawn, ((room - size) / 2).floor()), size], dim=1)


def resized_crop(images: Tensor, boxes: Tensor, height: int, width: int, flip: Tensor) -> Tensor:
    """Cut a box out of each image, resize it bilinearly with antialiasing, and mirror the chosen ones.

    Both directions are a product with a matrix of weights, of which each image has its own.

    Args:
        images: (B, 3, H, W).
        boxes: Left, top, width and height, (B, 4).
        height: h.
        width: w.
        flip: Which to mirror, (B,) bool.

    Returns:
        (B, 3, h, w) float32.

    Example:
        >>> image = torch.tensor([[[[1, 3, 9], [1, 3, 9]]]])
        >>> resized_crop(image, torch.tensor([[0.0, 0.0, 2.0, 2.0]]), 1, 1, torch.tensor([False]))
        tensor([[[[2.]]]])
    """
    left, top, columns, rows = boxes.T
    across = _weights(left, columns, images.shape[3], width)  # (B, w, W)
    across = torch.where(flip[:, None, None], across.flip(1), across)
    down = _weights(top, rows, images.shape[2], height)  # (B, h, H)
    return down[:, None] @ images.float() @ across[:, None].transpose(2, 3)


def _weights(first: Tensor, length: Tensor, inside: int, wanted: int) -> Tensor:
    """How much each of `inside` pixels counts for each of `wanted` ones, (B, wanted, inside)."""
    scale = (length / wanted)[:, None, None]
    reach = scale.clamp(min=1)
    centres = first[:, None, None] + (torch.arange(wanted, device=first.device)[:, None] + 0.5) * scale
    pixels = torch.arange(inside, device=first.device)
    weights = (1 - (pixels + 0.5 - centres).abs() / reach).clamp(min=0)
    begun = pixels >= first[:, None, None]
    weights = weights * (begun & (pixels < (first + length)[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image counter-clockwise around its centre; the nearest pixel counts, and what comes in is black.

    Args:
        images: (B, 3, H, W).
        degrees: (B,).

    Returns:
        Images of the same shape and type, stored channels last.

    Example:
        >>> rotate(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([90.0]))
        tensor([[[[2, 4],
                  [1, 3]]]])
    """
    _, _, height, width = images.shape
    angle = (degrees * (math.pi / 180))[:, None, None]
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    columns = (x * angle.cos() - y * angle.sin() + (width - 1) / 2).round().long()  # (B, H, W)
    rows = (x * angle.sin() + y * angle.cos() + (height - 1) / 2).round().long()
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    turned = images.permute(0, 2, 3, 1)[each, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return (turned * inside[..., None]).permute(0, 3, 1, 2)
