"""Checks that need no true label: row order, agreement, domain gap, and whether both sides tell one story.

Letters in shapes: N real images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
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

INDEPENDENT = 4.0
"""Standard deviations above shuffled rows below which labels and prototypes count as independent."""

ROWS_PER_CLASS = 20
"""Rows per class below which the row-order test cannot tell noisy from independent."""

TELLING = 0.55
"""Least share of what the features tell about the given labels that the prototypes must tell.

On CIFAR-10 it is .71 to 1.7 for all label files, .56 and more with three synthetic images per class, and .05 to .53 for
synthetic images that show something else and for features that do not tell the classes apart.
"""

EXCHANGED = 1.8
"""How many times as often as its own label a class carries the next one's, all round a cycle, where classes are
numbered otherwise. On CIFAR-10 at most 1.45 for 70 % PMD noise, and 2.2 and more where two classes are exchanged."""

GAP_ROWS = 5000  # of each side, that a line is to separate

AGREEING = 3.0
"""Standard deviations above shuffled rows below which labels and prototypes agree no more often than by chance.

On CIFAR-10 the published label files, up to 70 % PMD noise, and 70 % uniform noise have 100 and more; with rows in
another order, or synthetic classes numbered the other way round, they have 2 or less.
"""


class Unrelated(InputError):
    """Given labels that have nothing to do with what synthetic images say of the real ones."""


def domain_gap(features: Array, synthetic_features: Array) -> float:
    """How well a line tells real from synthetic images: 0.5 not at all, 1 always.

    A linear discriminant is fitted on one half of each and measured on the other, both ways, as balanced accuracy.

    Args:
        features: Features of the real images, (N, D), finite; at most `GAP_ROWS` evenly spaced rows are used.
        synthetic_features: Features of the synthetic images, (M, D), finite.

    Raises:
        InputError: Wrong type or shape, a non-finite number, or fewer than four rows on a side.
    """
    check_array("features", features, ("N", "D"))
    check_array("synthetic_features", synthetic_features, ("M", features.shape[1]))
    sides = []
    for name, value in (("features", features), ("synthetic_features", synthetic_features)):
        check_floating(name, value)
        if value.shape[0] < 4:
            raise InputError(f"{name}: expected at least 4 rows, got {value.shape[0]}")
        side = float_tensor(value[:: -(-value.shape[0] // GAP_ROWS)], torch.float64, torch.device("cpu"))
        if not bool(side.isfinite().all()):
            raise InputError(f"{name}: expected finite numbers, got others")
        sides.append(side)
    rates = []
    for fold in (0, 1):
        real, synthetic = (side[fold::2] for side in sides)
        center = (real.mean(dim=0) + synthetic.mean(dim=0)) / 2
        within = (real.T.cov(correction=0) + synthetic.T.cov(correction=0)).reshape(2 * real.shape[1:]) / 2  # (D, D)
        ridge = 0.1 * within.diagonal().mean().clamp_min(1e-12) * torch.eye(within.shape[0], dtype=torch.float64)
        direction = torch.linalg.solve(within + ridge, synthetic.mean(dim=0) - real.mean(dim=0))
        left, right = ((side[1 - fold :: 2] - center) @ direction for side in sides)
        rates += [float((left < 0).double().mean()), float((right > 0).double().mean())]
    return sum(rates) / len(rates)


@dataclass(frozen=True)
class RowOrder:
    """Whether given labels and what prototypes say of the same images depend on each other.

    Attributes:
        agreement: Fraction of rows where both name the same class. Not tested: systematic flips push it below chance.
        score: Chi-square of the contingency table, in standard deviations above its mean under shuffled rows.
        conclusive: Whether there were enough rows and classes to tell.
        independent: Whether the labels say nothing about the images: wrong order or wrong data set.
    """

    agreement: float
    score: float
    conclusive: bool
    independent: bool = field(default=False)


def row_order(given: Array, predictions: Array, num_classes: int) -> RowOrder:
    """Test whether given labels are independent of what the prototypes say of the same rows.

    However noisy labels are, they depend on the images; in a wrong order, or of another data set, they do not.

    Args:
        given: Given labels, (N,) integers in [0, C).
        predictions: Classes by the prototypes alone, (N,) integers in [0, C), never by a head trained on `given`.
        num_classes: C.

    Example:
        >>> nearest = np.arange(1000) % 4
        >>> row_order((nearest + 1) % 4, nearest, 4).independent
        False
        >>> row_order(np.random.default_rng(0).permutation(nearest), nearest, 4).independent
        True
    """
    check_labels("given", given, num_classes)
    check_labels("predictions", predictions, num_classes)
    check_array("predictions", predictions, (given.shape[0],))
    left, right = (label_tensor(one, torch.device("cpu")).numpy() for one in (given, predictions))
    count = len(left)
    agreement = float((left == right).mean()) if count else float("nan")
    cells, seen = np.unique(left * num_classes + right, return_counts=True)
    tables = [np.bincount(one, minlength=num_classes) for one in (left, right)]
    kinds = [int((table > 0).sum()) for table in tables]
    if min(kinds, default=0) < 2 or count < 4:
        return RowOrder(agreement, 0.0, False)
    expected = tables[0][cells // num_classes] * tables[1][cells % num_classes] / count
    chi_square = float((seen * seen / expected).sum() - count)
    # Mean and variance over all orders of the rows, for fixed counts of the classes (Haldane 1940, Dawson 1954).
    mean = count * (kinds[0] - 1) * (kinds[1] - 1) / (count - 1)
    even = [(kind - 1) * (count - kind) / (count - 1) for kind in kinds]
    uneven = [
        (count * float((1 / table[table > 0]).sum()) - kind**2) / (count - 2)
        for table, kind in zip(tables, kinds, strict=True)
    ]
    variance = 2 * count / (count - 3) * (even[0] - uneven[0]) * (even[1] - uneven[1])
    variance += count**2 / (count - 1) * uneven[0] * uneven[1]
    score = (chi_square - mean) / math.sqrt(max(variance, 1e-18))
    conclusive = count >= ROWS_PER_CLASS * num_classes
    return RowOrder(agreement, score, conclusive, conclusive and score < INDEPENDENT)


def check_row_order(given: Array, predictions: Array, num_classes: int) -> RowOrder:
    """`row_order`, but independent labels are an error.

    Raises:
        Unrelated: The labels are independent of the images.
    """
    result = row_order(given, predictions, num_classes)
    if result.independent:
        raise Unrelated(
            f"given: expected labels of these images in this order, got labels independent of what the prototypes say "
            f"(agreement {result.agreement:.3f}, {result.score:.1f} deviations above shuffled rows); "
            f"check the row order, the data set and what the synthetic images show"
        )
    return result


def agreement_doubt(given: Array, predictions: Array, num_classes: int) -> str:
    """One line for people where labels and prototypes agree no more often than by chance; empty where they do.

    `row_order` finds labels that have nothing to do with the images. This finds also classes whose numbers mean
    different things on both sides; since flips of every label to another class look the same, it is a doubt and no
    error.

    Args:
        given: Given labels, (N,) integers in [0, C).
        predictions: Classes by the prototypes alone, (N,) integers in [0, C).
        num_classes: C.

    Example:
        >>> nearest = np.arange(1000) % 4
        >>> agreement_doubt(nearest, nearest, 4)
        ''
        >>> agreement_doubt(3 - nearest, nearest, 4)[:79]
        'given labels and nearest prototypes name the same class for 0.0% of the images,'
    """
    check_labels("given", given, num_classes)
    check_labels("predictions", predictions, num_classes)
    check_array("predictions", predictions, (given.shape[0],))
    left, right = (label_tensor(one, torch.device("cpu")).numpy() for one in (given, predictions))
    count = len(left)
    if count < max(2, ROWS_PER_CLASS * num_classes):
        return ""
    rows, columns = (np.bincount(one, minlength=num_classes) for one in (left, right))
    rows, columns = rows.astype(float), columns.astype(float)
    # How often both agree under all orders of the rows: the mean and the variance, by the counts alone.
    expected = float(rows @ columns) / count
    variance = (expected - rows @ columns**2 / count**2 - rows**2 @ columns / count**2 + expected**2 / count) * count
    deviation = math.sqrt(max(0.0, float(variance) / (count - 1)))
    agreeing = int((left == right).sum())
    if deviation > 1e-9:
        score = (agreeing - expected) / deviation
    else:  # one of them is the same for all; where that are the given labels, nothing can be said
        score = 0.0 if agreeing < count and columns.max() == count else math.inf
    if score >= AGREEING:
        return ""
    return (
        f"given labels and nearest prototypes name the same class for {agreeing / count:.1%} of the images, hardly "
        f"more often than by chance ({score:.1f} deviations above it): is the order of the rows the same, do the class "
        "numbers mean the same, and does the encoder know the classes?"
    )


def prototype_classes(
    features: Array, synthetic_features: Array, synthetic_labels: Array, num_classes: int
) -> NDArray[np.int64]:
    """The nearest prototype of each image by cosine, each domain centred on its own mean, in chunks, (N,) int64.

    `row_order` compares the given labels with them. A row that is not finite gets class 0.
    """
    check_array("features", features, ("N", "D"))
    check_array("synthetic_features", synthetic_features, ("M", features.shape[1]))
    cpu = torch.device("cpu")
    reference, classes = float_tensor(synthetic_features, torch.float32, cpu), label_tensor(synthetic_labels, cpu)
    reference = reference - reference.mean(dim=0)
    sums = torch.zeros((num_classes, reference.shape[1])).index_add_(0, classes, reference)
    directions = F.normalize(sums, dim=1).T
    step = 8192
    center = torch.zeros(features.shape[1], dtype=torch.float64)
    for start in range(0, features.shape[0], step):
        center += float_tensor(features[start : start + step], torch.float64, cpu).nan_to_num(0, 0, 0).sum(dim=0)
    mean = (center / max(features.shape[0], 1)).float()
    found = np.empty(features.shape[0], dtype=np.int64)
    for start in range(0, features.shape[0], step):
        chunk = float_tensor(features[start : start + step], torch.float32, cpu).nan_to_num(0, 0, 0) - mean
        found[start : start + step] = (F.normalize(chunk, dim=1) @ directions).argmax(dim=1).numpy()
    return found


@dataclass(frozen=True)
class Story:
    """Whether synthetic images and given labels tell the same story.

    Attributes:
        share: What the prototypes tell about the given labels, as a share of what the features tell, in nats per nat.
        cycles: Classes whose numbers look exchanged, each cycle from one class to the next.
        message: One line for people where the two contradict each other; empty where they do not.
    """

    share: float
    cycles: tuple[tuple[int, ...], ...]
    message: str


def compare_stories(by_prototypes: Tensor, by_given: Tensor, given: Tensor, transition: Tensor) -> Story:
    """Find synthetic images that do not show the classes of the given labels, or classes that are numbered otherwise.

    Noise lowers what prototypes and features tell about the given labels alike, so heavy noise passes. Systematic noise
    gives labels to other classes too, but not all round a cycle of classes.

    Args:
        by_prototypes: The class of each image by the prototypes alone, (N,) int64.
        by_given: The class by cross-fitted heads that were trained on the given labels alone, (N,) int64.
        given: Given labels, (N,) int64.
        transition: p(given label | class by the prototypes), (C, C), a row per given label.
    """
    classes = len(transition)
    learnt, shown = (_information(one, given, classes) for one in (by_given, by_prototypes))
    share = shown / learnt if learnt > 0 else math.inf
    own = transition / transition.diagonal().clamp_min(1e-6)  # by how much a column's label exceeds its own
    likeliest = linear_sum_assignment(-transition.T.clamp_min(1e-6).log().cpu().numpy())[1].tolist()
    # Two classes that are exchanged may lie on a longer cycle of the likeliest permutation, which noise weakens.
    exchanged = (torch.minimum(own, own.T).triu(1) >= EXCHANGED).nonzero().tolist()
    cycles, clearest = [], 0.0
    for cycle in dict.fromkeys([*map(tuple, exchanged), *_cycles(likeliest)]):
        pairs = list(zip(cycle, (*cycle[1:], cycle[0]), strict=True))
        weakest = min(float(own[new, old]) for old, new in pairs)
        if weakest >= EXCHANGED:
            cycles.append(cycle)
            clearest = max(clearest, weakest)
    message = ""
    if cycles:
        shown_cycles = "; ".join(" -> ".join(map(str, (*one, one[0]))) for one in cycles[:3])
        message = (
            f"images that look like a synthetic class mostly carry the label of another, all round: {shown_cycles} "
            f"(up to {clearest:.1f} times as often as their own label); do the class numbers mean the same?"
        )
    elif max(learnt, shown) <= 0 and len(given) >= ROWS_PER_CLASS * classes**2 and bool((given != given[0]).any()):
        message = (
            "neither the features nor the synthetic images tell anything about the given labels; does the encoder see "
            "what is in the images?"
        )
    elif share < TELLING:
        message = (
            f"the synthetic images tell only {share:.0%} of what the features tell about the given labels; do they "
            "show these classes, and does the encoder see both kinds of image alike?"
        )
    return Story(share, tuple(cycles), message)


def _cycles(target: list[int]) -> Iterator[tuple[int, ...]]:
    """The cycles of a permutation that move something."""
    seen: set[int] = set()
    for start in range(len(target)):
        cycle, place = [], start
        while place not in seen:
            seen.add(place)
            cycle.append(place)
            place = target[place]
        if len(cycle) > 1:
            yield tuple(cycle)


def _information(left: Tensor, right: Tensor, classes: int) -> float:
    """Mutual information of two labellings in nats, less its bias from finite counts."""
    count = max(len(left), 1)
    tables = [torch.bincount(one, minlength=classes).double() / count for one in (left, right)]
    cells, seen = torch.unique(left * classes + right, return_counts=True)
    joint = seen.double() / count
    product = tables[0][cells // classes] * tables[1][cells % classes]
    return max(0.0, float((joint * (joint / product).log()).sum()) - (classes - 1) ** 2 / (2 * count))
