"""The refiners that the benchmarks compare, each one function from the evidence to labels.

Letters in shapes: N real images, M synthetic images, D features, C classes. A refiner's options are its keyword
arguments, so that an unknown one is a TypeError. A new refiner is one function and one entry in `REFINERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.evidence import Evidence
from synth_refine import class_prototypes, refine_labels
from synth_refine.refine.anchored import HIDDEN, Posterior, anchored_posterior
from synth_refine.refine.checks import check_row_order, prototype_classes
from synth_refine.refine.decide import decide

Refiner = Callable[..., Tensor]
"""`refiner(evidence, **options)`: labels, (N,) int64, or soft labels, (N, C) float32 with rows that sum to one."""


def none(evidence: Evidence) -> Tensor:
    """The given labels."""
    return evidence.given.clone()


def paper(evidence: Evidence, threshold: float = 0.6, weight: float = 0.5) -> Tensor:
    """The rule of arXiv:2509.04298: the best class by cosine and softmax where its score reaches the threshold."""
    decision = refine_labels(evidence.features, evidence.logits, _prototypes(evidence), threshold, weight=weight)
    return decision.apply(evidence.given)


def zero_shot(evidence: Evidence) -> Tensor:
    """The class of the nearest prototype by cosine, whatever the given label."""
    logits = torch.zeros_like(evidence.logits)
    decision = refine_labels(evidence.features, logits, _prototypes(evidence), threshold=-1.0, weight=1.0)
    return decision.apply(evidence.given)


def anchored(evidence: Evidence, margin: float | None = None, rounds: int = 12, hidden: int = HIDDEN) -> Tensor:
    """The most probable true class where `decide` changes the label, the given label elsewhere."""
    return decide(_posterior(evidence, rounds, hidden), evidence.given, margin=margin).apply(evidence.given)


def anchored_soft(evidence: Evidence, rounds: int = 12, hidden: int = HIDDEN) -> Tensor:
    """The posterior of the true class as soft labels."""
    posterior = _posterior(evidence, rounds, hidden).posterior
    assert isinstance(posterior, Tensor)
    return posterior


def _posterior(evidence: Evidence, rounds: int, hidden: int) -> Posterior:
    opinion = prototype_classes(evidence.features, evidence.synthetic, evidence.synthetic_labels, evidence.num_classes)
    opinions = torch.from_numpy(opinion).to(evidence.given.device)
    check_row_order(evidence.given, opinions, evidence.num_classes)
    return anchored_posterior(
        evidence.features,
        evidence.given,
        evidence.synthetic,
        evidence.synthetic_labels,
        num_classes=evidence.num_classes,
        text_prototypes=evidence.text_prototypes,
        second_view=evidence.logits if evidence.two_views else None,
        seed=evidence.seed,
        rounds=rounds,
        hidden=hidden,
    )


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
