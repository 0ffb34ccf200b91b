"""The refiners that the benchmarks compare, each one function from the evidence to labels.

Letters in shapes: N real images, M synthetic images, D features, C classes. A refiner's options are its keyword
arguments, so that an unknown one is a TypeError. A new refiner is one function and one entry in `REFINERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from synth_refine import class_prototypes, refine_labels


@dataclass(frozen=True)
class Evidence:
    """Everything a refiner may look at. The true labels of the real images are not in it."""

    features: Tensor  # (N, D) of the real images
    logits: Tensor  # (N, C) of a classifier trained on the given labels
    given: Tensor  # (N,) int64
    synthetic: Tensor  # (M, D), features of the synthetic images by the same encoder
    synthetic_labels: Tensor  # (M,) int64, the class each image was made for
    num_classes: int
    seed: int = 0
    text_prototypes: Tensor | None = None  # (C, D), of an encoder that reads text


Refiner = Callable[..., Tensor]
"""`refiner(evidence, **options)`: labels, (N,) int64, or soft labels, (N, C) float32 with rows that sum to one."""


def none(evidence: Evidence) -> Tensor:
    """The given labels."""
    return evidence.given.clone()


def paper(evidence: Evidence, threshold: float = 0.6, weight: float = 0.5) -> Tensor:
    """The rule of arXiv:2509.04298: the best class by cosine and softmax where its score reaches the threshold."""
    decision = refine_labels(evidence.features, evidence.logits, _prototypes(evidence), threshold, weight=weight)
    return decision.apply(evidence.given)


def zero_shot(evidence: Evidence) -> Tensor:
    """The class of the nearest prototype by cosine, whatever the given label."""
    logits = torch.zeros_like(evidence.logits)
    decision = refine_labels(evidence.features, logits, _prototypes(evidence), threshold=-1.0, weight=1.0)
    return decision.apply(evidence.given)


def _prototypes(evidence: Evidence) -> Tensor:
    return class_prototypes(evidence.synthetic, evidence.synthetic_labels, evidence.num_classes)


REFINERS: dict[str, Refiner] = {
    "none": none,
    "paper": paper,
    "zero-shot": zero_shot,
}

SOFT_REFINERS: frozenset[str] = frozenset()
"""Refiners that give soft labels."""
