"""Thresholds per class, calibrated on held-out synthetic images, and what each threshold would do.

Letters in shapes: N real images, M synthetic images, D features, C classes, n simulated images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from synth_refine._io.check import (
    Array,
    InputError,
    check_array,
    check_floating,
    check_labels,
    float_tensor,
    label_tensor,
)
from synth_refine.refine.decide import bayes
from synth_refine.refine.result import CPU

PRECISION = 0.9  # fraction of the changes to a class that should be right
SIMULATED = 20  # given labels simulated for each synthetic image
MOST_DRAWN = 1 << 24  # probabilities held for them, n * C


def calibrate_thresholds(scores: Array, labels: Array, precision: float = PRECISION) -> NDArray[np.float32]:
    """Per class, the smallest score from which on images of known class are right often enough.

    Args:
        scores: Scores of images of known class by what was not fitted to them, (M, C).
        labels: The class of each, (M,) integers in [0, C).
        precision: Fraction that must be right among the images that get the class at or above its threshold, in (0, 1].

    Returns:
        Thresholds, (C,) float32; infinity for a class that never reaches the precision: no label is changed to it.

    Raises:
        InputError: An argument has the wrong kind, type, shape or range.

    Example:
        >>> scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.55, 0.45], [0.2, 0.8]])
        >>> calibrate_thresholds(scores, np.array([0, 0, 1, 1]), precision=1.0).round(2)
        array([0.6, 0.8], dtype=float32)
    """
    check_array("scores", scores, ("M", "C"))
    check_floating("scores", scores)
    check_labels("labels", labels, scores.shape[1])
    check_array("labels", labels, (scores.shape[0],))
    if not 0 < precision <= 1:
        raise InputError(f"precision: expected a number in (0, 1], got {precision}")
    table, truth = float_tensor(scores, torch.float32, CPU), label_tensor(labels, CPU)
    thresholds = np.full(table.shape[1], np.inf, dtype=np.float32)
    if not len(table):
        return thresholds
    best, winner = table.max(dim=1)
    for number in range(table.shape[1]):
        rows = (winner == number).nonzero()[:, 0]
        rows = rows[best[rows].argsort(descending=True)]
        right = (truth[rows] == number).double().cumsum(dim=0)
        enough = (right / torch.arange(1, len(rows) + 1) >= precision).nonzero()[:, 0]
        if len(enough):
            thresholds[number] = float(best[rows[enough[-1]]])
    return thresholds


def posterior_thresholds(probs: Tensor, labels: Tensor, by_given: Tensor, seed: int = 0) -> NDArray[np.float32]:
    """Thresholds on the posterior, which is what a decision compares.

    Each synthetic image gets given labels as real images of its class have them, by the transition matrix, and the
    posterior follows; those whose posterior names another class than that label are changes of known worth.

    Args:
        probs: What heads that were not trained on them say of synthetic images, (M, C).
        labels: Their intended classes, (M,) int64.
        by_given: p(given label | true class), (C, C), a row per given label.
        seed: Of the draws.
    """
    draws = max(1, min(SIMULATED, MOST_DRAWN // max(probs.numel(), 1)))
    generator = torch.Generator().manual_seed(seed)
    given = torch.multinomial(by_given.T[labels].cpu(), draws, replacement=True, generator=generator).to(
        labels
    )  # (M, draws)
    posterior = bayes(probs.repeat_interleave(draws, dim=0), by_given, given.flatten())
    changed = posterior.argmax(dim=1) != given.flatten()
    return calibrate_thresholds(posterior[changed], labels.repeat_interleave(draws)[changed])


def paper_thresholds(features: Tensor, labels: Tensor, logits: Tensor, weight: float = 0.5) -> NDArray[np.float32]:
    """Per class, the smallest score from which on the paper's rule is right about nine in ten synthetic images.

    Each synthetic image is scored against prototypes without it, so no true label of a real image is needed.

    Args:
        features: Features of the synthetic images, (M, D), finite.
        labels: Their intended classes, (M,) int64; every class has at least one.
        logits: What heads trained on the real images say of them, (M, C).
        weight: Weight of the cosine in the score.
    """
    features = features.double()
    classes = logits.shape[1]
    sums = torch.zeros((classes, features.shape[1]), dtype=torch.float64).index_add_(0, labels, features)
    directions = F.normalize(features, dim=1)
    cosine = directions @ F.normalize(sums, dim=1).T
    rest = sums[labels] - features  # zero for a class's only image, whose cosine is then zero
    cosine[torch.arange(len(labels)), labels] = (directions * F.normalize(rest, dim=1)).sum(dim=1)
    return calibrate_thresholds(weight * cosine + (1 - weight) * logits.double().softmax(dim=1), labels)


@dataclass(frozen=True)
class SweepRow:
    """One threshold of a sweep."""

    threshold: float  # smallest posterior of the new class
    changed: float  # fraction of the labels that change
    noise_after: float  # estimated
    wrong_changes: float  # estimated fraction of the changes; NaN without a change
    empty_classes: int  # classes left without an image


def sweep(
    proposed: Tensor,
    confidence: Tensor,
    stays: Tensor,
    given: Tensor,
    allowed: Tensor,
    classes: int,
    thresholds: Sequence[float] | None = None,
) -> list[SweepRow]:
    """What each threshold on the posterior of the new class would do, by the posterior's own account.

    Args:
        proposed: The most probable class of each image, (N,) int64.
        confidence: Its posterior, (N,).
        stays: Posterior of the given label, (N,).
        given: Given labels, (N,) int64.
        allowed: Which labels may change at all, (N,) bool.
        classes: C.
        thresholds: By default 0 to 0.95 in steps of 0.05, and 0.99.
    """
    rows, count = [], max(len(given), 1)
    for threshold in thresholds if thresholds is not None else [*(step / 20 for step in range(20)), 0.99]:
        changed = allowed & (proposed != given) & (confidence >= threshold)
        left = torch.where(changed, proposed, given).bincount(minlength=classes)
        kept = torch.where(changed, confidence, stays).double().nan_to_num(1.0)
        wrong = 1 - float(confidence[changed].double().mean()) if bool(changed.any()) else float("nan")
        share = float(changed.double().sum()) / count
        after = 1 - float(kept.sum()) / count if len(given) else 0.0
        rows.append(SweepRow(float(threshold), share, after, wrong, int((left == 0).sum())))
    return rows
