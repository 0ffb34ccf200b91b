"""Images of a source in, batches of pixels (B, H, W, 3) uint8 and their features (B, D) out, here or on a cluster.

Letters in shapes: B images of a batch, H x W pixels, D features.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from synth_refine._io.check import InputError
from synth_refine.images.decode import decode, fitted
from synth_refine.images.encoders import Encoder, Preprocess
from synth_refine.images.listing import Images
from synth_refine.images.readers import Reader

Decoded: TypeAlias = "tuple[int, NDArray[np.uint8], NDArray[np.bool_]]"  # number of a batch, pixels, which are good


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Decoded images in batches of one size: (B, 3, H, W) uint8, and which of them are good, (B,) bool."""

    def __init__(
        self,
        read: Reader,
        batches: list[range],
        preprocess: Preprocess | None,
        size: tuple[int, int],
        there: Sequence[str | None] = (),
    ):
        """Batches of rows; `size` is the height and width that all images come in.

        `there` names, row by row, the images that others could read, so that no row is bad only on this node.
        """
        self.read, self.batches, self.preprocess, self.size, self.there = read, batches, preprocess, size, there
        self.enough = None if preprocess is None else preprocess.size

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """One batch; a bad image is black in it.

        Raises:
            InputError: An image that others could read cannot be read here.
        """
        rows = self.batches[number]
        pixels = np.zeros((len(rows), *self.size, 3), dtype=np.uint8)
        good = np.zeros(len(rows), dtype=bool)
        for place, row in enumerate(rows):
            try:
                data = self.read(row)
            except InputError as error:
                if self.there and self.there[row] is not None:
                    raise InputError(
                        f"engine: {self.there[row]} cannot be read on node {platform.node()}: {error}"
                    ) from error
                continue
            try:
                image = _telling(decode(data, at_least=self.enough), self.preprocess)
            except InputError:
                continue
            if (image.height, image.width) == self.size:
                pixels[place], good[place] = np.asarray(image), True
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(good)


def _telling(image: Image.Image, preprocess: Preprocess | None) -> Image.Image:
    """A decoded image as the encoder wants it.

    Raises:
        InputError: All its pixels are the same, as where it is blank or transparent all over.
    """
    image = fitted(image, preprocess)
    if not np.ptp(np.asarray(image), axis=(0, 1)).any():
        raise InputError(f"image: expected something to see, got one colour everywhere: {image.getpixel((0, 0))}")
    return image


def decoded_shard(
    part: tuple[dict[int, range], Reader, list[str | None]], *, preprocess: Preprocess | None, size: tuple[int, int]
) -> Iterator[Decoded]:
    """A task on a cluster: some batches.

    Args:
        part: Rows of each batch by its number, a reader of all of them, and the id of each row, None where it could not
            be read before.
        preprocess: Of the encoder.
        size: Height and width.

    Yields:
        Number of the batch, pixels, (B, H, W, 3), and which are good, (B,).

    Raises:
        InputError: This node cannot read an image that could be read before, as where it sees other folders.
    """
    rows, read, names = part
    batches = Batches(read, list(rows.values()), preprocess, size, names)
    for place, number in enumerate(rows):
        pixels, good = batches[place]
        yield number, pixels.permute(0, 2, 3, 1).numpy(), good.numpy()


def embedder(make: Callable[..., Encoder], wanted: str, device: str) -> Callable[[Decoded], tuple[int, Any]]:
    """An actor on a cluster: embeds what `decoded_shard` gives.

    Raises:
        InputError: The encoder that `make` builds on this node cannot be had or has another id than `wanted`.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"engine: expected a GPU that torch can use on node {platform.node()}, got none")
    encoder = make(device=device)
    if encoder.id != wanted:
        raise InputError(f"encoder: expected the same weights on every node, got others on node {platform.node()}")

    def embed(batch: Decoded) -> tuple[int, Any]:
        number, pixels, good = batch
        # The same order of bytes as here, or a convolution may round otherwise.
        features = embed_good(encoder, torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(good))
        return number, features.numpy()

    return embed


def embed_good(encoder: Encoder, pixels: Tensor, good: Tensor) -> Tensor:
    """Features of a batch, (B, D), NaN for bad images."""
    if bool(good.all()):
        return encoder.embed(pixels).cpu()
    found = encoder.embed(pixels[good] if bool(good.any()) else pixels[:1]).cpu()  # a black one tells D
    features = found.new_full((len(good), found.shape[1]), torch.nan)
    if bool(good.any()):
        features[good] = found
    return features


def first_size(images: Images) -> tuple[int, int]:
    """Height and width of the first image that can be decoded."""
    for row in range(len(images.ids)):
        try:
            image = images.image(row)
        except InputError:
            continue
        return image.height, image.width
    raise InputError(f"images: expected at least one that can be decoded, got {len(images.ids)} bad ones")


def why_bad(images: Images, row: int, preprocess: Preprocess | None, size: tuple[int, int]) -> str:
    """Why an image was left out."""
    try:
        image = _telling(images.image(row), preprocess)
    except InputError as error:
        return str(error)
    return f"image: expected {size[1]}x{size[0]} pixels, as the first has, got {image.width}x{image.height}"
