"""Class prototypes: the mean feature of each class's synthetic images (arXiv:2509.04298, section 3).

Letters in shapes: M synthetic images, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from synth_refine._io.check import (
    Array,
    ArrayT,
    InputError,
    check_array,
    check_floating,
    check_labels,
    float_tensor,
    label_tensor,
)

CHUNK_ROWS = 8192
BLOCK_ROWS = 2048  # near duplicates are sought in blocks of this many rows by as many


def class_prototypes(
    features: ArrayT, labels: ArrayT, num_classes: int | None = None, *, normalize: bool = False
) -> ArrayT:
    """Average the features of each class, chunk by chunk, so that a memory-mapped array of any length will do.

    Args:
        features: Features of the synthetic images, (M, D), float16 to float64.
        labels: The intended class of each image, (M,) integers in [0, C).
        num_classes: C; by default the largest label plus one.
        normalize: Scale every feature to length one before averaging and every prototype after it. The paper does
            neither.

    Returns:
        Prototypes, (C, D), float64 for float64 features and float32 otherwise.

    Raises:
        InputError: Wrong shape or type, a non-finite feature, or a class without an image.

    Example:
        >>> class_prototypes(np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]]), np.array([0, 0, 1]))
        array([[2., 0.],
               [0., 1.]])
    """
    check_array("features", features, ("M", "D"))
    check_floating("features", features)
    check_labels("labels", labels)
    check_array("labels", labels, (features.shape[0],))
    if num_classes is None:
        num_classes = max(int(labels.max()) + 1, 1) if labels.shape[0] else 0
    check_labels("labels", labels, num_classes)

    device = features.device if isinstance(features, Tensor) else torch.device("cpu")
    classes = label_tensor(labels, device)
    counts = torch.bincount(classes, minlength=num_classes)
    if num_classes == 0 or not bool(counts.all()):
        missing = int((counts == 0).nonzero()[0, 0]) if num_classes else 0
        raise InputError(f"labels: expected at least one synthetic image per class, got none for class {missing}")
    sums = torch.zeros((num_classes, features.shape[1]), dtype=torch.float64, device=device)
    for start in range(0, features.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        chunk = float_tensor(features[rows], torch.float64, device)
        if not bool(chunk.isfinite().all()):
            bad = start + int((~chunk.isfinite().all(dim=1)).nonzero()[0, 0])
            raise InputError(f"features: expected finite numbers, got a non-finite one in row {bad}")
        if normalize:
            chunk = torch.nn.functional.normalize(chunk, dim=1)
        sums.index_add_(0, classes[rows], chunk)
    means = sums / counts[:, None]
    if normalize:
        means = torch.nn.functional.normalize(means, dim=1)
    if isinstance(features, Tensor):
        return means.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    return means.numpy().astype(np.float64 if features.dtype == np.float64 else np.float32)


@dataclass(frozen=True)
class Quality:
    """What is unfit in a set of synthetic images.

    Attributes:
        keep: Images that are fit: neither of another class's looks nor a near duplicate of an earlier one, (M,) bool.
        looks_like: The class whose prototype is nearest, the image itself left out of its own, (M,) int64.
        off_class: Images nearer to another class than to their own by more than the margin, (M,) bool.
        duplicate_of: Earliest image that this one nearly repeats, (M,) int64; -1 where there is none.
        confusion: Fraction of each class's images (row) that look like each class (column), (C, C).
        confused: Pairs (intended class, looks like, fraction) of different classes, the largest fraction first.
        counts: Fit images per class, (C,) int64.
        too_few: Classes with fewer fit images than asked for.
    """

    keep: NDArray[np.bool_]
    looks_like: NDArray[np.int64]
    off_class: NDArray[np.bool_]
    duplicate_of: NDArray[np.int64]
    confusion: NDArray[np.float64]
    confused: list[tuple[int, int, float]]
    counts: NDArray[np.int64]
    too_few: list[int]

    def lines(self) -> list[str]:
        """The findings for people, one line each."""
        found = [
            f"{int(self.off_class.sum())} of {len(self.keep)} images look like another class",
            f"{int((self.duplicate_of >= 0).sum())} of {len(self.keep)} images nearly repeat an earlier one",
        ]
        found += [f"{share:.0%} of class {made} look like class {other}" for made, other, share in self.confused]
        found += [f"class {number} has only {int(self.counts[number])} fit images" for number in self.too_few]
        return found


def prototype_quality(
    features: ArrayT,
    labels: ArrayT,
    num_classes: int | None = None,
    *,
    margin: float = 0.1,
    duplicate: float = 0.98,
    confused: float = 0.1,
    enough: int = 10,
) -> Quality:
    """Find synthetic images that would spoil the prototypes.

    Cosines are taken after centring on the mean of the set, since those of post-ReLU features lie close together. Near
    duplicates are compared in blocks, so that M images need memory for one block only, beside their features.

    Args:
        features: Features of the synthetic images, (M, D), float16 to float64, finite.
        labels: The intended class of each image, (M,) integers in [0, C), at least one per class.
        num_classes: C; by default the largest label plus one.
        margin: Difference of cosines by which another class must be nearer, in [0, 2].
        duplicate: Cosine from which two images of a class count as near duplicates, in (0, 1].
        confused: Smallest fraction of a class that makes a confused pair, in (0, 1].
        enough: Fit images that a class should have.

    Returns:
        The report. `features[report.keep]` is the fit set; a class may be too small in it, or empty.

    Raises:
        InputError: As `class_prototypes`, or an option out of its range.

    Example:
        >>> images = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.05]])
        >>> prototype_quality(images, np.array([0, 0, 1, 1, 1]), duplicate=1.0).off_class.tolist()
        [False, False, False, False, True]
    """
    for name, value, low, high in (
        ("margin", margin, 0.0, 2.0),
        ("duplicate", duplicate, 0.0, 1.0),
        ("confused", confused, 0.0, 1.0),
    ):
        if not low <= value <= high:
            raise InputError(f"{name}: expected a number in [{low:g}, {high:g}], got {value}")
    means = float_tensor(
        class_prototypes(features, labels, num_classes), torch.float32, torch.device("cpu")
    )  # checks too
    cpu = torch.device("cpu")
    classes = label_tensor(labels, cpu)
    counts = torch.bincount(classes, minlength=means.shape[0])
    center = (means * counts[:, None]).sum(dim=0) / counts.sum()
    sums = (means - center) * counts[:, None]  # (C, D)
    directions = F.normalize(sums, dim=1).T
    rows = torch.arange(classes.shape[0])
    looks_like = torch.empty_like(classes)
    off_class = torch.empty(classes.shape[0], dtype=torch.bool)
    for start in range(0, classes.shape[0], CHUNK_ROWS):
        part = classes[start : start + CHUNK_ROWS]
        chunk = float_tensor(features[start : start + CHUNK_ROWS], torch.float32, cpu) - center
        own = F.normalize(chunk, dim=1)
        cosine = own @ directions
        without = (own * F.normalize(sums[part] - chunk, dim=1)).sum(dim=1)
        alone = counts[part] == 1  # nothing is left of a class without its only image
        index = rows[: part.shape[0]]
        cosine[index, part] = torch.where(alone, cosine[index, part], without)
        best, winner = cosine.max(dim=1)
        looks_like[start : start + CHUNK_ROWS] = winner
        off_class[start : start + CHUNK_ROWS] = best > cosine[index, part] + margin

    duplicate_of = torch.full_like(classes, -1)
    for number in range(means.shape[0]):
        members = (classes == number).nonzero()[:, 0]
        for start in range(0, members.shape[0], BLOCK_ROWS):
            later = members[start : start + BLOCK_ROWS]
            first = torch.full_like(later, classes.shape[0])
            left = _directions_of(features, later, center)
            for other in range(0, start + 1, BLOCK_ROWS):
                earlier = members[other : other + BLOCK_ROWS]
                near = left @ _directions_of(features, earlier, center).T >= duplicate - 1e-6
                near &= earlier[None, :] < later[:, None]
                first = torch.minimum(first, torch.where(near, earlier, classes.shape[0]).amin(dim=1))
            duplicate_of[later] = torch.where(first < classes.shape[0], first, -1)

    keep = ~off_class & (duplicate_of < 0)
    table = torch.zeros(counts.shape[0], counts.shape[0], dtype=torch.float64)
    table.index_put_((classes, looks_like), torch.ones(classes.shape[0], dtype=torch.float64), accumulate=True)
    table /= counts[:, None]
    pairs = [
        (made, other, float(table[made, other]))
        for made, other in (table >= confused).nonzero().tolist()
        if made != other
    ]
    left_over = torch.bincount(classes[keep], minlength=counts.shape[0])
    return Quality(
        keep=keep.numpy(),
        looks_like=looks_like.numpy(),
        off_class=off_class.numpy(),
        duplicate_of=duplicate_of.numpy(),
        confusion=table.numpy(),
        confused=sorted(pairs, key=lambda pair: -pair[2]),
        counts=left_over.numpy(),
        too_few=(left_over < enough).nonzero()[:, 0].tolist(),
    )


def _directions_of(features: Array, rows: Tensor, center: Tensor) -> Tensor:
    index = rows.to(features.device) if isinstance(features, Tensor) else rows.numpy()
    return F.normalize(float_tensor(features[index], torch.float32, torch.device("cpu")) - center, dim=1)
