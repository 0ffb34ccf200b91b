"""Thresholds per class, calibrated on held-out synthetic images, and what each threshold would do.

Letters in shapes: N real images, M synthetic images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

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
from synth_refine.refine.anchored import Posterior
from synth_refine.refine.decide import Answer, decide


def calibrate_thresholds(probabilities: Array, labels: Array, precision: float = 0.9) -> NDArray[np.float32]:
    """Per class, the smallest probability from which on held-out synthetic images are right often enough.

    Args:
        probabilities: What a head says of synthetic images that it was not trained on, (M, C), as in
            `Posterior.anchor_head`.
        labels: The class each was made for, (M,) integers in [0, C).
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
    check_array("probabilities", probabilities, ("M", "C"))
    check_floating("probabilities", probabilities)
    check_labels("labels", labels, probabilities.shape[1])
    check_array("labels", labels, (probabilities.shape[0],))
    if not 0 < precision <= 1:
        raise InputError(f"precision: expected a number in (0, 1], got {precision}")
    scores = float_tensor(probabilities, torch.float32, torch.device("cpu"))
    truth = label_tensor(labels, torch.device("cpu"))
    thresholds = np.full(scores.shape[1], np.inf, dtype=np.float32)
    if scores.shape[0] == 0:
        return thresholds
    best, winner = scores.max(dim=1)
    for number in range(scores.shape[1]):
        rows = (winner == number).nonzero()[:, 0]
        rows = rows[best[rows].argsort(descending=True)]
        right = (truth[rows] == number).double().cumsum(dim=0)
        enough = (right / torch.arange(1, rows.shape[0] + 1) >= precision).nonzero()[:, 0]
        if enough.shape[0]:
            thresholds[number] = float(best[rows[enough[-1]]])
    return thresholds


@dataclass(frozen=True)
class SweepRow:
    """One threshold of a sweep."""

    threshold: float  # smallest probability of the new class
    changed: float  # fraction of the labels that change
    noise_after: float  # estimated; NaN as in Decision
    wrong_changes: float  # nominal fraction; NaN without a change
    empty_classes: int  # classes left without an image


def sweep(posterior: Posterior, given: ArrayT, thresholds: Sequence[float] | None = None) -> list[SweepRow]:
    """What each threshold on the probability of the new class would do.

    Args:
        posterior: From `anchored_posterior`.
        given: The given labels, (N,) integers.
        thresholds: By default 0 to 0.95 in steps of 0.05, and 0.99.
    """
    rows, cpu = [], torch.device("cpu")
    for threshold in thresholds if thresholds is not None else [*(step / 20 for step in range(20)), 0.99]:
        decision = decide(posterior, given, thresholds=threshold, force=True)
        counts = label_tensor(decision.apply(given), cpu).bincount(minlength=posterior.posterior.shape[1])
        changed = float((label_tensor(decision.answers, cpu) == Answer.CHANGE).double().mean()) if len(given) else 0.0
        rows.append(
            SweepRow(float(threshold), changed, decision.noise_after, decision.wrong_changes, int((counts == 0).sum()))
        )
    return rows


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """The sweep as a Markdown table.

    Example:
        >>> print(sweep_table([SweepRow(0.5, 0.25, 0.1, 0.08, 0)]))
        | threshold | changed | noise after (estimated) | wrong changes (nominal) | empty classes |
        |---|---|---|---|---|
        | 0.50 | 0.250 | 0.100 | 0.080 | 0 |
    """
    lines = [
        "| threshold | changed | noise after (estimated) | wrong changes (nominal) | empty classes |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.threshold:.2f} | {row.changed:.3f} | {row.noise_after:.3f} | {row.wrong_changes:.3f} "
        f"| {row.empty_classes} |"
        for row in rows
    ]
    return "\n".join(lines)


def plot_sweep(rows: Sequence[SweepRow], path: str | Path) -> None:
    """Draw the sweep into a picture file; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    thresholds = [row.threshold for row in rows]
    axes.plot(thresholds, [row.changed for row in rows], label="changed")
    axes.plot(thresholds, [row.noise_after for row in rows], label="noise after (estimated)")
    axes.plot(thresholds, [row.wrong_changes for row in rows], label="wrong changes (nominal)")
    axes.set(xlabel="smallest probability of the new class", ylabel="fraction", ylim=(0, None))
    axes.legend(loc="upper right")  # matplotlib searches for the best place, and warns where that takes long
    figure.savefig(path)
