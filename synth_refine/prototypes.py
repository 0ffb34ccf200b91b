"""Class prototypes: the mean feature of each class's synthetic images (arXiv:2509.04298, section 3).

Letters in shapes: M synthetic images, D features, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from synth_refine._check import InputError, check_array, check_floating, check_labels
from synth_refine.refine import ArrayT, _tensor

CHUNK_ROWS = 8192


def class_prototypes(
    features: ArrayT, labels: ArrayT, num_classes: int | None = None, *, normalize: bool = False
) -> ArrayT:
    """Average the features of each class, chunk by chunk, so that a memory-mapped array of any length will do.

    Args:
        features: Features of the synthetic images, (M, D), float16 to float64.
        labels: The class each image was made for, (M,) integers in [0, C).
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
    classes = torch.as_tensor(labels, device=device).long()
    counts = torch.bincount(classes, minlength=num_classes)
    if num_classes == 0 or not bool(counts.all()):
        missing = int((counts == 0).nonzero()[0, 0]) if num_classes else 0
        raise InputError(f"labels: expected at least one synthetic image per class, got none for class {missing}")
    sums = torch.zeros((num_classes, features.shape[1]), dtype=torch.float64, device=device)
    for start in range(0, features.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        chunk = _tensor(features[rows], torch.float64, device)
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
