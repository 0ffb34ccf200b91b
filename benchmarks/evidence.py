"""What a refiner of the benchmarks may look at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """Everything a refiner may look at. The true labels of the real images are not in it.

    Letters in shapes: N real images, M synthetic images, D features, C classes.
    """

    features: Tensor  # (N, D) of the real images
    logits: Tensor  # (N, C) of a classifier trained on the given labels
    given: Tensor  # (N,) int64
    synthetic: Tensor  # (M, D), features of the synthetic images by the same encoder
    synthetic_labels: Tensor  # (M,) int64, the intended class of each synthetic image
    num_classes: int
    seed: int = 0
    text_prototypes: Tensor | None = None  # (C, D), of an encoder that reads text
    two_views: bool = False  # whether the classifier behind `logits` sees the images otherwise than through `features`
