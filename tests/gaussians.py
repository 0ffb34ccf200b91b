"""Gaussian classes of known truth: what synthetic images, noisy labels and a frozen encoder come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from synth_refine import Refinement, refine_anchored


@dataclass
class Problem:
    """Features, (N, D), given and true labels, (N,), synthetic features, (M, D), and their labels, (M,)."""

    features: np.ndarray
    given: np.ndarray
    synthetic: np.ndarray
    synthetic_labels: np.ndarray
    true: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What refine_anchored takes."""
        return self.features, self.given, self.synthetic, self.synthetic_labels

    def refine(self, **options: Any) -> Refinement:
        return refine_anchored(*self.arrays, **{"rounds": 4, **options})

    def wrong(self, result: Refinement) -> float:
        """Fraction of wrong labels after the refinement."""
        return float((result.apply(self.given) != self.true).mean())

    @property
    def noise(self) -> float:
        return float((self.given != self.true).mean())


def problem(
    count: int = 600,
    classes: int = 4,
    width: int = 8,
    noise: float = 0.4,
    per_class: int = 20,
    seed: int = 0,
    distance: float = 4.0,
    flips: str = "uniform",
) -> Problem:
    """Classes `distance` deviations apart, synthetic images of another domain, and labels that flip.

    Args:
        count: N.
        classes: C.
        width: D.
        noise: Fraction of the labels that flip.
        per_class: Synthetic images per class.
        seed: Of everything.
        distance: Between the centres of two classes.
        flips: "uniform" to any other class, or "next": to the next one, for all classes but the first.
    """
    rng = np.random.default_rng(seed)
    centers = distance * np.linalg.qr(rng.normal(size=(max(width, classes),) * 2))[0][:classes, :width] / np.sqrt(2)
    true = rng.integers(0, classes, count)
    other = (true + (rng.integers(1, max(classes, 2), count) if flips == "uniform" else (true > 0))) % classes
    labels = np.repeat(np.arange(classes), per_class)
    real, synthetic = (centers[one] + rng.normal(size=(len(one), width)) for one in (true, labels))
    given = np.where(rng.random(count) < noise, other, true)
    return Problem(real.astype(np.float32), given, (synthetic + 1).astype(np.float32), labels, true)
