"""Label noise for experiments: polynomial-margin diminishing (PMD), uniform, asymmetric, symmetric and pair noise.

PMD noise is that of "Learning with Feature-Dependent Label Noise: A Progressive Approach", Zhang, Zheng, Wu, Goswami,
Chen, ICLR 2021, https://openreview.net/forum?id=ZPa2SyGcbwh, in the form of its public code: an image whose two most
probable classes are hard to tell apart often gets the second one. Letters in shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from synth_refine._io.check import Array, InputError, check_array, check_floating, check_labels

Labels = NDArray[np.int64]
Floats = NDArray[np.float64]

CIFAR10_FLIPS: Mapping[int, int] = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
"""Truck to automobile, bird to airplane, cat to dog and back, deer to horse."""

CIFAR100_FLIPS: Mapping[int, int] = {label: label - label % 5 + (label + 1) % 5 for label in range(100)}
"""Each class to the next of its block of five indices, as published: the blocks are not the semantic superclasses."""


@dataclass(frozen=True)
class PosteriorConfig:
    """How the network that makes PMD noise is trained; the defaults are the published ones."""

    epochs: int = 25
    lr: float = 0.001  # constant
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 0.0005
    batch_size: int = 128


def train_posterior(
    model: nn.Module,
    inputs: Tensor,
    true_labels: Tensor,
    config: PosteriorConfig | None = None,
    *,
    augment: Callable[[Tensor], Tensor] | None = None,
    seed: int = 123,
) -> NDArray[np.float32]:
    """Train a network on the true labels and record its softmax during the training pass of the last epoch.

    So every row is seen by the network in training mode, augmented, before that step's update.

    Args:
        model: Maps a batch of `inputs` to logits, (n, C); trained in place, on the device of `inputs`.
        inputs: What the model takes, N rows.
        true_labels: True labels, (N,) int64: this simulates how the wrong labels come about.
        config: The recipe.
        augment: Applied to every batch of inputs; may draw from torch's default generators.
        seed: Order of the batches and whatever `augment` draws. The model's start is the caller's.

    Returns:
        Posterior, (N, C) float32.

    Raises:
        InputError: The labels do not fit the inputs, or there are fewer than two rows.
    """
    config = PosteriorConfig() if config is None else config
    check_labels("true_labels", true_labels)
    check_array("true_labels", true_labels, (len(inputs),))
    if len(inputs) < 2 or config.epochs < 1:
        what = f"{len(inputs)} rows and {config.epochs} epochs"
        raise InputError(f"inputs: expected at least two rows and one epoch, got {what}")
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    recorded: list[tuple[Tensor, Tensor]] = []
    with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
        torch.manual_seed(seed)
        model.train()
        for _ in range(config.epochs):
            recorded.clear()
            batches = list(torch.split(torch.randperm(len(inputs)).to(inputs.device), config.batch_size))
            if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot take a batch of one
                batches[-2:] = [torch.cat(batches[-2:])]
            for rows in batches:
                batch = inputs[rows]
                logits = model(batch if augment is None else augment(batch))
                loss = F.cross_entropy(logits, true_labels[rows])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch's stubs
                optimiser.step()
                recorded.append((rows, logits.detach().float().softmax(dim=1)))
    order, posterior = (torch.cat(parts) for parts in zip(*recorded, strict=True))
    result: NDArray[np.float32] = posterior[order.argsort()].cpu().numpy()
    return result


def keep_function(margin: Floats, kind: int) -> Floats:
    """Probability that an image keeps its most probable class, before the division by the factor.

    Args:
        margin: Posterior of the most probable class minus that of the second, in [0, 1].
        kind: 1, (1 + d^2) / 2; 2, d^3; 3, (d + d^2 + d^3) / 3.

    Example:
        >>> [float(keep_function(np.array(0.5), kind)) for kind in (1, 2)]
        [0.625, 0.125]
    """
    if kind == 1:
        return (1 + margin**2) / 2
    if kind == 2:
        return margin**3
    if kind == 3:
        return (margin + margin**2 + margin**3) / 3
    raise InputError(f"kind: expected 1, 2 or 3, got {kind}")


def pmd(posterior: Array, kind: int, factor: float, *, seed: int = 123) -> Labels:
    """Draw each label from the two most probable classes of its image.

    The most probable one is kept with the probability `keep_function(margin, kind) / factor`, at most 1. The true
    label plays no part, so where the posterior is wrong, the label may be wrong even if it is kept.

    Args:
        posterior: Class probabilities, (N, C); see `train_posterior`.
        kind: 1, 2 or 3.
        factor: Above 0; a larger one gives more noise. See `pmd_factor`.
        seed: Of the draws. With the same seed, a larger factor only ever moves labels to the second class.

    Returns:
        Given labels, (N,) int64.

    Example:
        >>> pmd(np.array([[0.9, 0.1, 0.0], [0.0, 0.5, 0.5]]), kind=2, factor=1000).tolist()
        [1, 2]
    """
    if not factor > 0:
        raise InputError(f"factor: expected a number above 0, got {factor}")
    first, second, keep = _margins(posterior, kind)
    uniform = np.random.RandomState(seed).random_sample(len(keep))
    return np.where(uniform < keep / factor, first, second)


def pmd_factor(posterior: Array, true_labels: Array, kind: int, rate: float) -> float:
    """Find the factor with which `pmd` is expected to give a noise rate.

    The expected rate is linear in 1 / factor up to the point where probabilities reach 1, and piecewise linear after
    it, so the result is exact. Where several factors fit, it is the largest: the one that cuts off least.

    Args:
        posterior: Class probabilities, (N, C).
        true_labels: True labels, (N,).
        kind: 1, 2 or 3.
        rate: Wanted fraction of labels that differ from the true ones, in (0, 1).

    Raises:
        InputError: No factor gives this rate; the message says which rates can be reached.

    Example:
        >>> posterior = np.array([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0]])
        >>> round(pmd_factor(posterior, np.array([0, 1]), kind=1, rate=0.35), 3)
        1.077
    """
    first, second, keep = _margins(posterior, kind)
    check_labels("true_labels", true_labels, np.shape(posterior)[1])
    check_array("true_labels", true_labels, (len(keep),))
    if not 0 < rate < 1:
        raise InputError(f"rate: expected a number in (0, 1), got {rate}")
    truth = np.asarray(true_labels)
    gain = (second == truth).astype(float) - (first == truth)  # change of the error when the first class is kept
    order = np.argsort(-keep, kind="stable")
    keep, gain = keep[order], gain[order]
    keep, gain = keep[keep > 0], gain[keep > 0]
    # At 1 / factor = 1 / keep[k] the probabilities of the images up to k are cut off at 1, the others still grow.
    cut = np.cumsum(gain)
    growing = np.sum(gain * keep) - np.cumsum(gain * keep)
    inverse = np.concatenate([[0.0], 1 / keep])
    rates = np.mean(second != truth) + np.concatenate([[0.0], cut + growing / keep]) / len(truth)
    for k in range(len(keep)):
        low, high = sorted(rates[k : k + 2])
        if low <= rate <= high and low < high:
            found = inverse[k] + (inverse[k + 1] - inverse[k]) * (rate - rates[k]) / (rates[k + 1] - rates[k])
            if found > 0:
                return float(1 / found)
    raise InputError(f"rate: expected one that some factor reaches, {rates.min():.3f} to {rates.max():.3f}, got {rate}")


def uniform(labels: Array, level: float, num_classes: int, *, seed: int = 77) -> Labels:
    """Replace each label, with probability `level`, by one of the other classes, each equally likely.

    Args:
        labels: Labels, (N,) integers in [0, C); they may be noisy already.
        level: In [0, 1].
        num_classes: C, 2 or more.
        seed: Of the draws, one multinomial per label in row order. 77 is that of the published files.

    Returns:
        New labels, (N,) int64.

    Example:
        >>> uniform(np.array([0, 1, 2, 0, 1, 2]), 0.5, num_classes=3).tolist()
        [0, 2, 2, 0, 1, 2]
    """
    if num_classes < 2:
        raise InputError(f"num_classes: expected 2 or more, got {num_classes}")
    rows = np.full((num_classes, num_classes), level / (num_classes - 1))
    np.fill_diagonal(rows, 1 - level)
    return _draw(labels, level, rows, seed)


def asymmetric(
    labels: Array, level: float, flips: Mapping[int, int], *, num_classes: int | None = None, seed: int = 77
) -> Labels:
    """Replace each label whose class is in `flips`, with probability `level`, by the class that it maps to.

    Args:
        labels: Labels, (N,) integers in [0, C); they may be noisy already.
        level: In [0, 1].
        flips: From class to class; `CIFAR10_FLIPS`, `CIFAR100_FLIPS` or your own. Other classes stay.
        num_classes: C; by default one more than the largest class in `labels` and `flips`.
        seed: Of the draws, one multinomial per label in row order. 77 is that of the published files.

    Returns:
        New labels, (N,) int64.

    Example:
        >>> asymmetric(np.array([3, 9, 0]), 1.0, CIFAR10_FLIPS).tolist()
        [5, 1, 0]
    """
    check_labels("labels", labels)
    if num_classes is None:
        num_classes = 1 + max([-1, *flips.keys(), *flips.values(), *np.unique(np.asarray(labels)).tolist()])
    outside = [label for label in (*flips.keys(), *flips.values()) if not 0 <= label < num_classes]
    if outside:
        raise InputError(f"flips: expected classes 0 to {num_classes - 1}, got {outside[0]}")
    rows = np.eye(num_classes)
    for source, target in flips.items():
        rows[source, source] -= level
        rows[source, target] += level
    return _draw(labels, level, rows, seed)


def symmetric(labels: Array, level: float, num_classes: int, *, seed: int = 77) -> Labels:
    """Move exactly `level` of every class, rounded down, to the other classes, each of which gets the same number.

    Where the number moved is no multiple of C - 1, classes chosen at random get one more.

    Args:
        labels: Labels, (N,) integers in [0, C); they may be noisy already.
        level: In [0, 1].
        num_classes: C, 2 or more.
        seed: Of the images that move and of their order.

    Returns:
        New labels, (N,) int64.

    Example:
        >>> np.bincount(symmetric(np.zeros(10, dtype=int), 0.6, num_classes=4)).tolist()
        [4, 2, 2, 2]
    """
    if num_classes < 2:
        raise InputError(f"num_classes: expected 2 or more, got {num_classes}")

    def targets(label: int, count: int, state: np.random.RandomState) -> Labels:
        others = np.setdiff1d(np.arange(num_classes), [label])
        return np.resize(state.permutation(others), count)

    return _move(labels, level, num_classes, targets, seed)


def pair(labels: Array, level: float, num_classes: int, *, seed: int = 77) -> Labels:
    """Move exactly `level` of every class, rounded down, to the class that follows it in a shuffled cycle of all.

    Args:
        labels: Labels, (N,) integers in [0, C); they may be noisy already.
        level: In [0, 1].
        num_classes: C, 2 or more.
        seed: Of the cycle and of the images that move.

    Returns:
        New labels, (N,) int64.

    Example:
        >>> np.bincount(pair(np.arange(20) % 2, 0.3, num_classes=2)).tolist()
        [10, 10]
    """
    if num_classes < 2:
        raise InputError(f"num_classes: expected 2 or more, got {num_classes}")
    cycle = np.random.RandomState(seed).permutation(num_classes)
    following = dict(zip(cycle, np.roll(cycle, -1), strict=True))
    return _move(labels, level, num_classes, lambda label, count, _: np.full(count, following[label]), seed)


def _move(
    labels: Array,
    level: float,
    num_classes: int,
    targets: Callable[[int, int, np.random.RandomState], Labels],
    seed: int,
) -> Labels:
    """Give int(level * n) images of each class, chosen at random, the labels of `targets(class, count, state)`."""
    check_labels("labels", labels, num_classes)
    if not 0 <= level <= 1:
        raise InputError(f"level: expected a number in [0, 1], got {level}")
    before, state = np.asarray(labels), np.random.RandomState(seed)
    after = before.astype(np.int64)
    for label in range(num_classes):
        rows = state.permutation(np.flatnonzero(before == label))
        moved = rows[: int(level * len(rows) + 1e-9)]  # 0.3 * 10 is below 3 by rounding
        after[moved] = targets(label, len(moved), state)
    return after


def _margins(posterior: Array, kind: int) -> tuple[Labels, Labels, Floats]:
    """Most probable and second class, (N,) each, and the value of the keep function, (N,)."""
    check_array("posterior", posterior, ("N", "C"))
    check_floating("posterior", posterior)
    eta = np.asarray(posterior, dtype=np.float64)
    if eta.shape[1] < 2:
        raise InputError(f"posterior: expected at least two classes, got shape {eta.shape}")
    if not ((eta >= 0) & (eta <= 1)).all():
        raise InputError("posterior: expected probabilities in [0, 1], got others; apply a softmax first")
    order = np.argsort(-eta, axis=1, kind="stable")[:, :2]  # equal ones: the lower class first
    top = np.take_along_axis(eta, order, axis=1)
    return order[:, 0], order[:, 1], keep_function(top[:, 0] - top[:, 1], kind)


def _draw(labels: Array, level: float, rows: Floats, seed: int) -> Labels:
    """One multinomial draw per label from the row of its class; (N,)."""
    check_labels("labels", labels, len(rows))
    if not 0 <= level <= 1:
        raise InputError(f"level: expected a number in [0, 1], got {level}")
    state = np.random.RandomState(seed)  # the published files' generator
    return np.array([state.multinomial(1, rows[label]).argmax() for label in np.asarray(labels)], dtype=np.int64)
