"""The refiners that the benchmarks compare, each one function from the evidence to labels.

Letters in shapes: N real images, M synthetic images, D features, C classes. A refiner's options are its keyword
arguments, so that an unknown one is a TypeError. A new refiner is one function and one entry in `REFINERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from benchmarks import rivals
from benchmarks.evidence import Evidence
from synth_refine import Refinement, class_prototypes, refine_labels
from synth_refine.refine.front import refine
from synth_refine.refine.solve import AnchoredDiagnostics

Refiner = Callable[..., Tensor]
"""`refiner(evidence, **options)`: labels, (N,) int64, or soft labels, (N, C) float32 with rows that sum to one."""


def none(evidence: Evidence) -> Tensor:
    """The given labels."""
    return evidence.given.clone()


def paper(evidence: Evidence, threshold: float = 0.6, weight: float = 0.5) -> Tensor:
    """The rule of arXiv:2509.04298: the best class by cosine and softmax where its score reaches the threshold."""
    prototypes = _prototypes(evidence)
    return refine(
        evidence.features,
        evidence.given,
        refiner="paper",
        prototypes=prototypes,
        logits=evidence.logits,
        threshold=threshold,
        weight=weight,
    ).apply(evidence.given)


def zero_shot(evidence: Evidence) -> Tensor:
    """The class of the nearest prototype by cosine, whatever the given label."""
    decision = refine_labels(evidence.features, None, _prototypes(evidence), threshold=-1.0, weight=1.0)
    return decision.apply(evidence.given)


def anchored(evidence: Evidence, threshold: float | str | None = None) -> Tensor:
    """The project's own refiner, see `synth_refine.refine_anchored`."""
    return anchored_result(evidence, threshold).apply(evidence.given)


def anchored_soft(evidence: Evidence) -> Tensor:
    """Its posterior of the true class as soft labels; the given label of an image that cannot be scored."""
    about = anchored_result(evidence).diagnostics
    assert isinstance(about, AnchoredDiagnostics)
    soft = F.one_hot(evidence.given, evidence.num_classes).float()
    if about.posteriors is not None:
        for rows, posteriors in about.posteriors():
            soft[rows] = posteriors.float()
    return soft


def anchored_result(evidence: Evidence, threshold: float | str | None = None) -> Refinement:
    """The anchored refiner's decision with what it rests on."""
    return refine(
        evidence.features,
        evidence.given,
        refiner="anchored",
        threshold=threshold,
        synthetic_features=evidence.synthetic,
        synthetic_labels=evidence.synthetic_labels,
        num_classes=evidence.num_classes,
        text_prototypes=evidence.text_prototypes,
        second_view=second_view(evidence),
        seed=evidence.seed,
    )


def second_view(evidence: Evidence) -> Tensor | None:
    """The logits as one more annotator, where they come from something else than the features."""
    return evidence.logits if evidence.two_views else None


def _prototypes(evidence: Evidence) -> Tensor:
    return class_prototypes(evidence.synthetic, evidence.synthetic_labels, evidence.num_classes)


REFINERS: dict[str, Refiner] = {
    "none": none,
    "paper": paper,
    "zero-shot": zero_shot,
    "anchored": anchored,
    "anchored-soft": anchored_soft,
    "cleanlab": rivals.cleanlab,
    **{f"knn-vote-{count}": partial(rivals.knn_vote, neighbours=count) for count in (10, 50, 200)},
    "ssr": rivals.ssr,
    "wann": rivals.wann,
    "clipcleaner": rivals.clipcleaner,
}

SOFT_REFINERS = frozenset({"anchored-soft"})
"""Refiners that give soft labels."""
