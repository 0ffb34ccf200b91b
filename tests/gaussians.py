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
        """Few rounds are enough for so easy classes."""
        return refine_anchored(*self.arrays, **{"rounds": 2, **options})

    def wrong(self, result: Refinement) -> float:
        """Fraction of wrong labels after the refinement."""
        return float((result.apply(self.given) != self.true).mean())

    @property
    def noise(self) -> float:
        """Fraction of wrong labels before it."""
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
    off: float = 0.3,
) -> Problem:
    """Classes, synthetic images of another domain, and labels of which some flip.

    Args:
        count: N.
        classes: C.
        width: D.
        noise: Fraction of the labels that flip.
        per_class: Synthetic images per class.
        seed: Of everything.
        distance: Deviations between the centres of two classes.
        flips: "uniform", to any other class; "next", to the next one, but class 0 never.
        off: How far synthetic images lie beside the real ones of their class, in distances of two classes.
    """
    rng = np.random.default_rng(seed)
    centers = distance / np.sqrt(2) * np.linalg.qr(rng.normal(size=(max(width, classes),) * 2))[0][:classes, :width]
    true = rng.integers(0, classes, count)
    other = (true + (rng.integers(1, max(classes, 2), count) if flips == "uniform" else (true > 0))) % classes
    labels = np.repeat(np.arange(classes), per_class)
    real, synthetic = (centers[one] + rng.normal(size=(len(one), width)) for one in (true, labels))
    synthetic += off * distance * rng.normal(size=centers.shape)[labels] / np.sqrt(width)
    given = np.where(rng.random(count) < noise, other, true)
    return Problem(real.astype(np.float32), given, (synthetic + 1).astype(np.float32), labels, true)
