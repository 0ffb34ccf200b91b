"""A task with what is needed to measure on it: noise by name, splits, and the noisy labels of validation images.

Letters in shapes: N training images, V validation images, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.base import Split, Task
from synth_refine import InputError, noise

Labels = NDArray[np.int64]
HOLD_OUT = 0.1  # of the training rows, for validation, where nothing else is there


@dataclass(frozen=True)
class Benchmark:
    """A task and what is needed to measure on it.

    Attributes:
        task: Everything a method may look at.
        true_labels: True labels of the training images, (N,) int64; None where nobody knows them.
        name: The data set.
        noise_name: Where the given labels come from.
        class_names: One per class.
    """

    task: Task
    true_labels: Tensor | None
    name: str
    noise_name: str
    class_names: tuple[str, ...]


def noisy_labels(
    noise_name: str,
    true_labels: Labels,
    num_classes: int,
    pmd_labels: Callable[[int, str], Labels],
    flips: Mapping[int, int] | None = None,
) -> Labels:
    """Labels with the named noise, each part applied to what the one before it gave.

    Args:
        noise_name: See `load`.
        true_labels: True labels, (N,).
        num_classes: C.
        pmd_labels: Gives PMD labels for a kind and a rate as written.
        flips: Class map of the asymmetric noise; None where the data set has none.
    """
    labels = true_labels
    for place, part in enumerate(noise_name.split("+")):
        if match := re.fullmatch(r"(uniform|symmetric|pair|asymmetric)-(0\.\d+)", part):
            level = float(match[2])
            if match[1] != "asymmetric":
                made = {"uniform": noise.uniform, "symmetric": noise.symmetric, "pair": noise.pair}[match[1]]
                labels = made(labels, level, num_classes)
            elif flips is None:
                raise InputError(
                    f"noise: expected no asymmetric part, this data set has no class map, got {noise_name}"
                )
            else:
                labels = noise.asymmetric(labels, level, flips, num_classes=num_classes)
        elif place == 0 and (match := re.fullmatch(r"pmd-([123])-(0\.\d+)", part)):
            labels = pmd_labels(int(match[1]), match[2])
        elif noise_name != "clean":
            example = "pmd-1-0.35, uniform-0.3 or pmd-1-0.35+asymmetric-0.3"
            raise InputError(f"noise: expected clean or a name like {example}, got {noise_name!r}")
    return labels


def hold_out(count: int, seed: int, share: float = HOLD_OUT) -> tuple[Labels, Labels]:
    """Rows for training and, a random share of all, for validation; both in order."""
    rows = np.arange(count)
    held_out = np.random.default_rng(seed).permutation(rows)[: round(share * count)]
    return np.setdiff1d(rows, held_out), np.sort(held_out)


def annotate(truth: Labels, matrix: NDArray[np.float64], seed: int) -> Labels:
    """What an annotator with these confusions would have said, (V,); a class without an example is got right."""
    rows = np.where(matrix.sum(axis=1, keepdims=True) > 0, matrix, np.eye(len(matrix)))
    sampled = np.random.default_rng(seed).random(len(truth))
    labels: Labels = (rows.cumsum(axis=1)[truth] <= sampled[:, None]).sum(axis=1).clip(max=len(rows) - 1)
    return labels


def build_task(
    num_classes: int,
    inputs: Tensor,
    given: Labels,
    truth: Labels | None,
    train: Labels,
    validation: Labels,
    synthetic: Split,
    test: Split,
) -> Task:
    """Cut training and validation rows out of `inputs`; without `truth` there is no clean validation."""
    rows, given_labels = torch.from_numpy(validation), torch.from_numpy(given)
    shared = inputs[rows]  # by both validation sets
    noisy = Split(shared, given_labels[rows])
    clean = Split(shared[:0], given_labels[:0]) if truth is None else Split(shared, torch.from_numpy(truth)[rows])
    kept = torch.from_numpy(train)
    return Task(num_classes, Split(inputs[kept], given_labels[kept]), synthetic, noisy, clean, test)
