"""Random crop and horizontal flip of a whole batch at once, on the device that holds it.

In distribution equal to torchvision's RandomCrop(H, padding=4) followed by RandomHorizontalFlip. Letters in shapes:
N images, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Places = slice | Tensor
"""Which rows of a batch are meant."""

EVERY = slice(None)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Crop each image out of its zero-padded self and mirror the chosen ones.

    Args:
        images: (N, 3, H, W), uint8 before normalisation, so that the padding is black as in torchvision.
        top: First row of each crop in the padded image, (N,) integers in [0, 2 * padding].
        left: First column, (N,) likewise.
        flip: Which crops to mirror, (N,) bool.
        padding: Zeros added at every side.

    Returns:
        Images of the same shape and type, stored channels last.

    Example:
        >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
        >>> crop_and_flip(image, torch.tensor([2]), torch.tensor([1]), torch.tensor([True]), padding=1)
        tensor([[[[4, 3],
                  [0, 0]]]])
    """
    count, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # (N, H + 2 padding, W + 2 padding, 3)
    rows = top[:, None] + torch.arange(height, device=device)  # (N, H)
    columns = torch.arange(width, device=device).expand(count, width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)  # (N, W)
    images_index = torch.arange(count, device=device)[:, None, None]
    return padded[images_index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_crop_and_flip(
    images: Tensor, padding: int = 4, flip: bool = True, *, of: int | None = None, places: Places = EVERY
) -> Tensor:
    """Draw one of (2 * padding + 1)^2 crops and, with `flip`, one of two mirrorings for each image.

    Args:
        images: (N, 3, H, W) uint8.
        padding: Zeros added at every side before the crop; 0 leaves the position as it is.
        flip: Mirror each image with probability 1/2; digits and letters must not be.
        of: Rows of the batch that the images are a part of, where several processes share it; None is all of it.
        places: Where in that batch they stand; all processes draw for the whole of it.

    Returns:
        Augmented images, (N, 3, H, W) uint8. The draws come from the default generator of the device.
    """
    count, device = len(images) if of is None else of, images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, count), device=device)[:, places]
    mirrored = torch.rand(count, device=device)[places] < (0.5 if flip else 0.0)
    return crop_and_flip(images, top, left, mirrored, padding)
