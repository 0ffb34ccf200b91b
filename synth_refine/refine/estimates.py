"""Honest estimates without true labels: how many labels are wrong before and after, and how many changes are.

Two extreme readings of the same data bound the truth: the given label depends on the true class alone (then the
posterior holds), or on what the image shows alone (then the probabilities without the given label hold). How far the
truth lies between them is read from two things. Noise that follows the image grows steadily from surely to hardly
classified images, while the errors of the heads do so in a bend. And wrong labels of surely classified images, which
are plain to see, follow either the class or the image's own runner-up.

Letters in shapes: N images, C classes, n images of the surer half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from synth_refine.refine.decide import NOISE_FLOOR, bayes, fit_transition, log_likelihood, tempered

BANDS = 16  # of confidence, over which the trend of the noise is read
EXPONENTS = (0.35, 0.42, 0.5, 0.6, 0.7, 0.84, 1.0)  # of the probabilities, chosen by the likelihood of the given labels
SHARES = 41  # mixtures of the two readings that are tried
DIRECTED_STEPS = 40
WIDER = 0.015  # added to an interval on both sides: a handful of readings is not all that could be


@dataclass(frozen=True)
class Estimate:
    """A fraction with an interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


NOT_ESTIMATED = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Estimates:
    """How many labels are wrong.

    Attributes:
        before: Fraction of the given labels.
        after: Fraction of the refined labels.
        wrong_changes: Fraction of the changes that do not lead to the true class.
    """

    before: Estimate = NOT_ESTIMATED
    after: Estimate = NOT_ESTIMATED
    wrong_changes: Estimate = NOT_ESTIMATED


@dataclass(frozen=True)
class _Reading:
    """What one way to temper the probabilities says: (before, after, wrong changes) by either extreme."""

    by_class: tuple[float, float, float]
    by_image: tuple[float, float, float]
    trend: float
    directed: float

    def mixed(self, what: int, share: float) -> float:
        return self.by_class[what] + share * (self.by_image[what] - self.by_class[what])

    def share(self, trend: bool, weight: float) -> float:
        """How far the truth lies from the first extreme."""
        start = self.trend if trend else 0.0
        # Near clean labels the directed share is the heads' own error.
        trusted = self.by_class[0] / (self.by_class[0] + NOISE_FLOOR)
        return start + (1 - start) * min(1.0, weight * self.directed * trusted)


def estimate_noise(
    probs: Tensor, given: Tensor, refined: Tensor, counted: tuple[float, float] | None = None
) -> Estimates:
    """Fractions of wrong labels, with intervals that span the ways to combine the readings.

    Args:
        probs: p(true class | image) by heads that did not see it, without the given label, (N, C).
        given: Given labels, (N,) int64.
        refined: Refined labels, (N,) int64.
        counted: What the changes do by counting: the drop of the noise rate, and the fraction of wrong changes.
    """
    if not len(given):
        return Estimates()
    likeliest = max(EXPONENTS, key=lambda one: _likelihood(tempered(probs, one), given))
    changed = refined != given
    exponents = {"plain": 1.0, "half": likeliest**0.5, "full": likeliest}
    readings = {name: _read(tempered(probs, one), given, refined, changed) for name, one in exponents.items()}

    def estimate(what: int, base: str, share: float, other: float | None = None, weight: float = 0.0) -> Estimate:
        value = readings[base].mixed(what, share)
        every = [value] + [
            one.mixed(what, one.share(trend, directed))
            for one in readings.values()
            for trend in (False, True)
            for directed in (0.0, 0.5, 1.0)
        ]
        if other is not None:
            other = max(0.0, other)
            value = value + weight * (other - value)
            every.append(other)
        return Estimate(value, max(0.0, min(every) - WIDER), min(1.0, max(every) + WIDER))

    late = readings["half"].share(False, 1.0)
    before = estimate(0, "half", readings["half"].share(True, 0.5))
    if not bool(changed.any()):
        return Estimates(before, estimate(1, "full", late))
    gain, wrong = (None, None) if counted is None else counted
    # What is left wrong is read off, and is what was wrong less what the changes gain: both err, and otherwise.
    left = None if gain is None else before.value - gain
    return Estimates(before, estimate(1, "full", late, left, 0.5), estimate(2, "full", late, wrong, 1.0))


def _likelihood(probs: Tensor, given: Tensor) -> float:
    return log_likelihood(probs, fit_transition(probs, given), given)


def _read(probs: Tensor, given: Tensor, refined: Tensor, changed: Tensor) -> _Reading:
    by_given = fit_transition(probs, given)
    posterior = bayes(probs, by_given, given)

    def fractions(table: Tensor) -> tuple[float, float, float]:
        before, after = (1 - table.gather(1, one[:, None])[:, 0] for one in (given, refined))
        return float(before.mean()), float(after.mean()), float(after[changed].mean())

    return _Reading(
        fractions(posterior), fractions(probs), _trend(probs, posterior, given), _directed(probs, by_given, given)
    )


def _trend(probs: Tensor, posterior: Tensor, given: Tensor) -> float:
    """The mixture of both readings at which noise over confidence is nearest to a rising straight line, in [0, 1]."""
    count = len(given)
    band = torch.empty(count, dtype=torch.int64, device=given.device)
    band[probs.amax(dim=1).argsort(descending=True, stable=True)] = (
        torch.arange(count, device=given.device) * BANDS // count
    )
    sizes = torch.bincount(band, minlength=BANDS).clamp_min(1)

    def noise(table: Tensor) -> Tensor:
        wrong = 1 - table.gather(1, given[:, None])[:, 0]
        return (torch.zeros(BANDS, device=wrong.device).index_add_(0, band, wrong) / sizes).double().cpu()

    low, high = noise(posterior), noise(probs)
    places = (torch.arange(BANDS).double() + 0.5) / BANDS
    design = torch.stack([torch.ones_like(places), places], dim=1)
    best, chosen = math.inf, 0.0
    for share in torch.linspace(0, 1, SHARES).tolist():
        values = low + share * (high - low)
        safe = values.clamp(0.01, 0.99)
        weights = 1 / (safe * (1 - safe) * BANDS / count + 0.005**2)
        slope = torch.linalg.solve(design.T @ (weights[:, None] * design), design.T @ (weights * values))
        line = design @ slope if slope[1] > 0 else (weights * values).sum() / weights.sum()
        miss = float((weights * (values - line) ** 2).sum())
        if miss < best:
            best, chosen = miss, share
    return chosen


def _directed(probs: Tensor, by_given: Tensor, given: Tensor) -> float:
    """Share of the wrong labels of surely classified images that follow the image and not its class alone, in [0, 1].

    In the surer half of the images a wrong label has one of two sources: the rest of the transition matrix, or the
    image's own runner-up odds. The share of the second is fitted by expectation maximisation.
    """
    sure = probs.amax(dim=1)
    rows = sure >= sure.median()
    table, labels = probs[rows], given[rows]
    classes = table.shape[1]
    other = 1 - torch.eye(classes, device=probs.device)
    noise = 1 - by_given.diagonal()
    law = F.normalize(by_given * other, p=1, dim=0)  # (C, C), a row per given label
    own = F.one_hot(labels, classes).to(table)
    toward = table.gather(1, labels[:, None]).clamp_min(1e-6) / (1 - table).clamp_min(1e-6) * (1 - own)
    share = 0.3
    for _ in range(DIRECTED_STEPS):
        right = table * (1 - noise) * own
        by_class = table * noise * (1 - share) * law[labels] * (1 - own)
        by_image = table * noise * share * toward
        total = (right + by_class + by_image).sum(dim=1, keepdim=True).clamp_min(1e-12)
        right, by_class, by_image = right / total, by_class / total, by_image / total
        wrong = (by_class + by_image).sum(dim=0)
        share = float(by_image.sum() / wrong.sum().clamp_min(1e-9))
        noise = wrong / (right.sum(dim=0) + wrong).clamp_min(1e-9)
        law = F.normalize(torch.zeros_like(law).index_add_(0, labels, by_class) * other + 0.5 * other, p=1, dim=0)
    return share
