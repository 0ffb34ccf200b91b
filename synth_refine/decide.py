"""From posteriors to decisions: keep, change or abstain, with the reason and the odds, and without doing harm.

Letters in shapes: N real images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from synth_refine._check import (
    Array,
    ArrayT,
    InputError,
    check_array,
    check_floating,
    check_labels,
    float_tensor,
    label_tensor,
)
from synth_refine.anchored import Posterior, bayes, fit_transition

NOISE_FLOOR = 0.03
"""Estimated noise below which the estimate is mostly the head's own error: the margin grows from there."""
SOFTENING = 0.7
"""Exponent of the head's probabilities in the do-no-harm check: what would be left to change if it were less sure.

Chosen on ten CIFAR-10 label files by comparison with the true gain: at 0.6 the check refuses a change set that halves
5 % uniform noise, at 0.8 it lets one through that breaks 0.1 % of clean labels.
"""
RECOGNISED = 0.5
"""Fraction of held-out synthetic images that heads must name rightly, or labels are left alone: features that do not
tell the classes apart say nothing worth a change. CIFAR-10 through a CLIP that knows letters alone has .41, and there
35 % wrong labels would become 60 %; through ImageNet networks it has .86 to .90.
"""
PERMUTATIONS = 200
INDEPENDENT = 4.0
"""Standard deviations above shuffled rows below which labels and opinion count as independent."""
ROWS_PER_CLASS = 20
"""Rows per class below which the row-order test cannot tell noisy from independent."""
AGREEING = 3.0
"""Standard deviations above shuffled rows below which labels and opinion agree no more often than by chance.

On CIFAR-10 the published label files, up to 70 % PMD noise, and 70 % uniform noise have 100 and more; with rows in
another order, or synthetic classes numbered the other way round, they have 2 or less.
"""


class Answer(IntEnum):
    """What happens to a label."""

    KEEP = 0
    CHANGE = 1
    ABSTAIN = 2  # the label stays, but somebody should look


REASONS = (
    "the given label is the most probable",
    "another class is more probable by more than the margin",
    "another class is more probable, but within the margin",
    "another class is more probable, but below that class's threshold",
    "the image could not be scored",
    "the change set would not lower the noise",
    "too few synthetic images are recognised to trust the features",
)


@dataclass(frozen=True)
class Decision:
    """One answer per image, kept apart from its application.

    Attributes:
        answers: `Answer` codes, (N,) int64.
        labels: The most probable class of each image, (N,) int64.
        odds: Posterior odds of that class against the given one, (N,); 1 where it is the given one.
        reasons: Index into `REASONS`, (N,) int64.
        margin: Odds that a change had to exceed.
        noise_before: Estimated noise of the given labels; NaN where the heads name fewer than half of the held-out
            synthetic images rightly: what they say of real ones is no estimate then.
        noise_after: Estimated noise after applying this decision; likewise.
        wrong_changes: Nominal fraction of the changes that are wrong, by the posterior: real and synthetic images
            differ, so read it beside the domain gap; NaN without a change.
        gain: Expected drop of the noise rate by the proposed changes if the head were less sure than it says.
        harmful: Whether the do-no-harm check advises against the proposed changes.
        blind: Whether it does so because the heads name fewer than half of the held-out synthetic images rightly, and
            not because the changes would not lower the noise.
    """

    answers: Array
    labels: Array
    odds: Array
    reasons: Array
    margin: float
    noise_before: float
    noise_after: float
    wrong_changes: float
    gain: float
    harmful: bool
    blind: bool

    def apply(self, given: ArrayT) -> ArrayT:
        """The refined labels: changed where so decided, the given label elsewhere. `given` is left as it is.

        Args:
            given: Given labels, (N,) integers, NumPy or torch as the decision's.

        Raises:
            InputError: `given` has another length or kind.
        """
        check_labels("given", given)
        check_array("given", given, tuple(self.labels.shape))
        if isinstance(given, Tensor) != isinstance(self.labels, Tensor):
            raise InputError(
                f"given: expected {type(self.labels).__name__} like the decision, got {type(given).__name__}"
            )
        change = self.answers == int(Answer.CHANGE)
        if isinstance(given, Tensor):
            return torch.where(cast(Tensor, change), given.new_tensor(cast(Tensor, self.labels).tolist()), given)
        return np.where(change, cast("NDArray[np.int64]", self.labels).astype(given.dtype), given)

    def summary(self) -> str:
        """One line for people."""
        count = [int((self.answers == int(answer)).sum()) for answer in Answer]
        noise = "noise not estimated"
        if not math.isnan(self.noise_before):
            noise = f"estimated noise {self.noise_before:.3f} -> {self.noise_after:.3f}"
        text = f"keep {count[0]}, change {count[1]}, abstain {count[2]}; {noise}"
        if not self.harmful:
            return text
        why = "the proposed changes would probably not lower the noise"
        if self.blind:
            why = (
                "fewer than half of the held-out synthetic images are recognised; try an encoder that knows the classes"
            )
        return f"{text}; {'changed on demand, although' if count[1] else 'nothing is changed:'} {why}"


def decide(
    posterior: Posterior,
    given: ArrayT,
    *,
    margin: float | None = None,
    thresholds: Sequence[float] | Array | float | None = None,
    force: bool = False,
) -> Decision:
    """Keep, change or abstain, image by image.

    A label is changed when the posterior odds of the best class against it exceed the margin, and the best class's
    probability reaches that class's threshold. The default margin is 1 + (0.03 / estimated noise)^2: one where the
    labels are noisy, and large where they are nearly clean, since the head's errors then outnumber those of the labels.

    Args:
        posterior: From `anchored_posterior`.
        given: The given labels it was computed from, (N,) integers.
        margin: Smallest odds, at least 1, that a change must exceed.
        thresholds: Smallest probability of the new class, one number or one per class, (C,); see
            `calibrate_thresholds`. None asks for none.
        force: Change labels even if the do-no-harm check advises against it.

    Returns:
        The decision; NumPy for NumPy inputs, torch for torch inputs.

    Raises:
        InputError: An argument has the wrong kind, shape or range.
    """
    classes = posterior.posterior.shape[1]
    check_labels("given", given, classes)
    check_array("given", given, (posterior.posterior.shape[0],))
    if isinstance(given, Tensor) != isinstance(posterior.posterior, Tensor):
        kind = type(posterior.posterior).__name__
        raise InputError(f"given: expected {kind} like the posterior, got {type(given).__name__}")
    if margin is not None and not margin >= 1:
        raise InputError(f"margin: expected odds of at least 1, got {margin}")
    limits = _limits(thresholds, classes)
    device = given.device if isinstance(given, Tensor) else torch.device("cpu")
    belief = float_tensor(posterior.posterior, torch.float32, device)
    labels_given = label_tensor(given, device)
    best, stays, winner = winners(belief, labels_given)
    odds = best / stays.clamp_min(1e-9)
    if margin is None:
        margin = default_margin(posterior.noise_before)

    skipped = torch.as_tensor(posterior.skipped, device=device)
    reasons = torch.ones_like(winner)
    reasons[best < limits.to(device)[winner]] = 3
    reasons[odds <= margin] = 2
    reasons[winner == labels_given] = 0
    reasons[skipped] = 4
    proposed = reasons == 1
    gain = _gain(posterior, labels_given, winner, proposed)
    blind = posterior.recognised < RECOGNISED
    harmful = bool(proposed.any()) and (gain <= 0 or blind)
    if harmful and not force:
        reasons[proposed] = 6 if blind else 5
    changed = reasons == 1
    answers = torch.full_like(winner, int(Answer.ABSTAIN))
    answers[reasons == 0] = int(Answer.KEEP)
    answers[changed] = int(Answer.CHANGE)
    kept = torch.where(changed, best, stays)
    scored = ~skipped
    before = 1 - float(stays[scored].mean()) if bool(scored.any()) else 0.0
    after = 1 - float(kept[scored].mean()) if bool(scored.any()) else 0.0
    if blind:
        before = after = math.nan
    wrong = 1 - float(best[changed].mean()) if bool(changed.any()) else float("nan")
    parts: dict[str, Array] = {"answers": answers, "labels": winner, "odds": odds, "reasons": reasons}
    if not isinstance(given, Tensor):
        parts = {name: np.asarray(part) for name, part in parts.items()}
    return Decision(
        **parts,
        margin=float(margin),
        noise_before=before,
        noise_after=after,
        wrong_changes=wrong,
        gain=gain,
        harmful=harmful,
        blind=harmful and blind,
    )


def winners(belief: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best class's probability, the given one's, and the best class, (N,) each; ties go to the given label."""
    stays = belief[torch.arange(belief.shape[0], device=belief.device), given]
    best, winner = belief.max(dim=1) if belief.shape[0] else (belief.new_empty(0), given)
    return best, stays, torch.where(stays >= best, given, winner)


def default_margin(noise: float) -> float:
    """The odds that a change has to exceed where this fraction of the given labels is wrong."""
    return 1 + (NOISE_FLOOR / max(noise, 1e-6)) ** 2


def _limits(thresholds: Sequence[float] | Array | float | None, classes: int) -> Tensor:
    try:
        values = torch.as_tensor(0.0 if thresholds is None else thresholds, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"thresholds: expected a number or one per class, got {thresholds!r}") from error
    if values.ndim == 0:
        values = values.expand(classes)
    check_array("thresholds", values, (classes,))
    if bool(values.isnan().any()):
        raise InputError("thresholds: expected numbers, got NaN")
    return values


def _gain(posterior: Posterior, given: Tensor, winner: Tensor, proposed: Tensor) -> float:
    """Expected drop of the noise rate by the proposed changes, under softened opinions and a transition fitted to them.

    The posterior itself cannot judge: by its own account every change to its best class helps.
    """
    if not bool(proposed.any()):
        return 0.0
    opinion = float_tensor(posterior.head, torch.float32, given.device).clamp_min(1e-9) ** SOFTENING
    opinion = F.normalize(opinion, p=1, dim=1)
    scored = (~torch.as_tensor(posterior.skipped, device=given.device)).nonzero()[:, 0]
    belief = torch.zeros_like(opinion)
    belief[scored] = bayes(opinion[scored], fit_transition(opinion[scored], given[scored], steps=30), given[scored])
    rows = proposed.nonzero()[:, 0]
    return float((belief[rows, winner[rows]] - belief[rows, given[rows]]).sum()) / given.shape[0]


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


def domain_gap(features: Array, anchors: Array) -> float:
    """How well a line tells real from synthetic images: 0.5 not at all, 1 always.

    A linear discriminant is fitted on one half of each and measured on the other, both ways, as balanced accuracy.

    Args:
        features: Features of the real images, (N, D), finite; at most 5,000 evenly spaced rows are used.
        anchors: Features of the synthetic images, (M, D), finite.

    Raises:
        InputError: Wrong type or shape, a non-finite number, or fewer than four rows on a side.
    """
    check_array("features", features, ("N", "D"))
    check_array("anchors", anchors, ("M", features.shape[1]))
    sides = []
    for name, value in (("features", features), ("anchors", anchors)):
        check_floating(name, value)
        if value.shape[0] < 4:
            raise InputError(f"{name}: expected at least 4 rows, got {value.shape[0]}")
        side = float_tensor(value[:: max(1, value.shape[0] // 5000)], torch.float64, torch.device("cpu"))
        if not bool(side.isfinite().all()):
            raise InputError(f"{name}: expected finite numbers, got others")
        sides.append(side)
    rates = []
    for fold in (0, 1):
        real, synthetic = (side[fold::2] for side in sides)
        center = (real.mean(dim=0) + synthetic.mean(dim=0)) / 2
        within = (real.T.cov(correction=0) + synthetic.T.cov(correction=0)) / 2
        ridge = 0.1 * within.diagonal().mean().clamp_min(1e-12) * torch.eye(within.shape[0], dtype=torch.float64)
        direction = torch.linalg.solve(within + ridge, synthetic.mean(dim=0) - real.mean(dim=0))
        left, right = ((side[1 - fold :: 2] - center) @ direction for side in sides)
        rates += [float((left < 0).double().mean()), float((right > 0).double().mean())]
    return sum(rates) / len(rates)


@dataclass(frozen=True)
class RowOrder:
    """Whether given labels and an opinion about the same images depend on each other.

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


def row_order(given: Array, predictions: Array, num_classes: int, *, seed: int = 0) -> RowOrder:
    """Test whether given labels are independent of what the prototypes say of the same rows.

    However noisy labels are, they depend on the images; in a wrong order, or of another data set, they do not.

    Args:
        given: Given labels, (N,) integers in [0, C).
        predictions: Classes by the prototypes alone, (N,) integers in [0, C), never by a head trained on `given`.
        num_classes: C.
        seed: Of the shuffles.

    Example:
        >>> opinion = np.arange(1000) % 4
        >>> row_order((opinion + 1) % 4, opinion, 4).independent
        False
        >>> row_order(np.random.default_rng(0).permutation(opinion), opinion, 4).independent
        True
    """
    check_labels("given", given, num_classes)
    check_labels("predictions", predictions, num_classes)
    check_array("predictions", predictions, (given.shape[0],))
    left = label_tensor(given, torch.device("cpu")).numpy()
    right = label_tensor(predictions, torch.device("cpu")).numpy()
    count = left.shape[0]
    agreement = float((left == right).mean()) if count else float("nan")
    rows, columns = np.bincount(left, minlength=num_classes), np.bincount(right, minlength=num_classes)
    varied = (rows > 0).sum() > 1 and (columns > 0).sum() > 1
    if not varied:
        return RowOrder(agreement, 0.0, False)
    expected = np.maximum(rows[:, None] * columns[None, :] / count, 1e-12).ravel()

    def chi_square(labels: NDArray[np.int64]) -> float:
        seen = np.bincount(labels * num_classes + right, minlength=num_classes * num_classes)
        return float((seen * seen / expected).sum() - count)

    rng = np.random.default_rng(seed)
    shuffled = np.array([chi_square(rng.permutation(left)) for _ in range(PERMUTATIONS)])
    score = (chi_square(left) - shuffled.mean()) / max(float(shuffled.std()), 1e-9)
    conclusive = count >= ROWS_PER_CLASS * num_classes
    return RowOrder(agreement, float(score), conclusive, conclusive and bool(score < INDEPENDENT))


def check_row_order(given: Array, predictions: Array, num_classes: int, *, seed: int = 0) -> RowOrder:
    """`row_order`, but independent labels are an error.

    Raises:
        InputError: The labels are independent of the images.
    """
    result = row_order(given, predictions, num_classes, seed=seed)
    if result.independent:
        raise InputError(
            f"given: expected labels of these images in this order, got labels independent of what the prototypes say "
            f"(agreement {result.agreement:.3f}, {result.score:.1f} deviations above shuffled rows); "
            f"check the row order and the data set"
        )
    return result


def agreement_doubt(given: Array, predictions: Array, num_classes: int) -> str:
    """One line for people where labels and opinion agree no more often than by chance; empty where they do.

    `row_order` finds labels that have nothing to do with the images. This finds also classes whose numbers mean
    different things on both sides; since flips of every label to another class look the same, it is a doubt and no
    error.

    Args:
        given: Given labels, (N,) integers in [0, C).
        predictions: Classes by the prototypes alone, (N,) integers in [0, C).
        num_classes: C.

    Example:
        >>> opinion = np.arange(1000) % 4
        >>> agreement_doubt(opinion, opinion, 4)
        ''
        >>> agreement_doubt(3 - opinion, opinion, 4)[:79]
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


def prototype_classes(features: Array, anchors: Array, anchor_labels: Array, num_classes: int) -> NDArray[np.int64]:
    """The nearest prototype of each image by cosine, each domain centred on its own mean, in chunks, (N,) int64.

    This is the opinion that `row_order` compares the given labels with. A row that is not finite gets class 0.
    """
    check_array("features", features, ("N", "D"))
    check_array("anchors", anchors, ("M", features.shape[1]))
    cpu = torch.device("cpu")
    reference, classes = float_tensor(anchors, torch.float32, cpu), label_tensor(anchor_labels, cpu)
    reference = reference - reference.mean(dim=0)
    sums = torch.zeros((num_classes, reference.shape[1])).index_add_(0, classes, reference)
    directions = F.normalize(sums, dim=1).T
    step = 8192
    center = torch.zeros(features.shape[1], dtype=torch.float64)
    for start in range(0, features.shape[0], step):
        center += float_tensor(features[start : start + step], torch.float64, cpu).nan_to_num(0, 0, 0).sum(dim=0)
    mean = (center / max(features.shape[0], 1)).float()
    answers = np.empty(features.shape[0], dtype=np.int64)
    for start in range(0, features.shape[0], step):
        chunk = float_tensor(features[start : start + step], torch.float32, cpu).nan_to_num(0, 0, 0) - mean
        answers[start : start + step] = (F.normalize(chunk, dim=1) @ directions).argmax(dim=1).numpy()
    return answers
